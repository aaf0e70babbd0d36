package traffic

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// ServePod answers each line on TCP and each datagram on UDP, of both families, with "NAME CLIENT LINE": the pod's name,
// the client's address and port as the pod sees them, and what the client sent. A request on TCP that begins with
// "GET " is answered as HTTP, so that curl works. It returns nil when ctx ends.
func ServePod(ctx context.Context, name string, port uint16) error {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return err
	}
	packets, err := config.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", port))
	if err != nil {
		_ = listener.Close()
		return err
	}
	var group sync.WaitGroup
	defer group.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		_ = listener.Close()
		_ = packets.Close()
	})
	defer stop()
	group.Go(func() { echoPackets(packets.(*net.UDPConn), name) })
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			cancel()
			_ = listener.Close()
			_ = packets.Close()
			return err
		}
		group.Go(func() {
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer stop()
			defer func() { _ = conn.Close() }()
			echoLines(conn, name)
		})
	}
}

func echoLines(conn net.Conn, name string) {
	client := unmap(conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	lines := bufio.NewReaderSize(conn, 512)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return
		}
		text := strings.TrimSpace(string(line))
		if strings.HasPrefix(text, "GET ") {
			answerHTTP(conn, lines, name, client)
			return
		}
		if _, err := fmt.Fprintf(conn, "%s %s %s\n", name, client, text); err != nil {
			return
		}
	}
}

func answerHTTP(conn net.Conn, lines *bufio.Reader, name string, client netip.AddrPort) {
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	body := fmt.Sprintf("pod %s, client %s\n", name, client)
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		len(body), body)
}

func echoPackets(conn *net.UDPConn, name string) {
	buffer := make([]byte, 2048)
	for {
		n, client, err := conn.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		answer := fmt.Appendf(nil, "%s %s %s\n", name, unmap(client), strings.TrimSpace(string(buffer[:n])))
		_, _ = conn.WriteToUDPAddrPort(answer, client)
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
