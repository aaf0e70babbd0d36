package traffic

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
)

// errGarbled is an answer that is not what a pod would say.
var errGarbled = errors.New("not an answer to this request")

// kind names a failure.
func kind(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, errGarbled):
		return "garbled"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNABORTED):
		return "reset"
	case errors.Is(err, io.EOF):
		return "closed"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return "other"
}

// answer takes a pod's answer to the request apart.
func answer(line, request string) (pod string, err error) {
	fields := strings.Fields(line)
	if len(fields) != 3 || fields[2] != request {
		return "", fmt.Errorf("%w: %q to %q", errGarbled, line, request)
	}
	return fields[0], nil
}
