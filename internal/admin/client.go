package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// ErrNotRunning says that no process of ours answers on the socket.
var ErrNotRunning = errors.New("no ravel runs here")

// ErrNoAccess says that the socket is not for this user.
var ErrNoAccess = errors.New("run as root")

// ErrNoSuchQuery says that the process that answers does not know the question: it has the other role, or is older.
var ErrNoSuchQuery = errors.New("the ravel that runs here does not answer that")

const (
	// queryTimeout bounds one question, on both sides.
	queryTimeout = 10 * time.Second
	// commandTimeout bounds one command, on both sides: some read all of the kernel's connections.
	commandTimeout = time.Minute
)

// maxAnswer bounds an answer: 1,000 services with 500 real servers are some 100 MB.
const maxAnswer = 512 << 20

// Get asks the process on the socket and decodes its answer into value. The error is ErrNotRunning, ErrNoAccess,
// ErrNoSuchQuery, a *Refusal, or says what went wrong over there.
func Get(ctx context.Context, socket, query string, value any) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	return ask(ctx, socket, http.MethodGet, query, nil, value)
}

// Post gives a command and its words to the process on the socket, and decodes the answer into value. The errors are
// those of Get.
func Post(ctx context.Context, socket, command string, words, value any) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	body, err := json.Marshal(words)
	if err != nil {
		return fmt.Errorf("asking for %s: %w", command, err)
	}
	return ask(ctx, socket, http.MethodPost, command, body, value)
}

func ask(ctx context.Context, socket, method, query string, words []byte, value any) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, method, "http://ravel/v1/"+query, bytes.NewReader(words))
	if err != nil {
		return fmt.Errorf("asking for %s: %w", query, err)
	}
	response, err := client.Do(request)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (nobody answers on %s)", ErrNotRunning, socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w (the admin socket %s is root's)", ErrNoAccess, socket)
	case err != nil:
		return fmt.Errorf("asking for %s: %w", query, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	said := strings.TrimSpace(string(body))
	switch {
	case err != nil:
		return fmt.Errorf("asking for %s: %w", query, err)
	case response.StatusCode == http.StatusNotFound, response.StatusCode == http.StatusMethodNotAllowed:
		return fmt.Errorf("%w: %s", ErrNoSuchQuery, query)
	case response.StatusCode == http.StatusBadRequest, response.StatusCode == http.StatusConflict:
		return &Refusal{Reason: said, Usage: response.StatusCode == http.StatusBadRequest}
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("asking for %s: %s", query, said)
	}
	if err := json.Unmarshal(body, value); err != nil {
		return fmt.Errorf("reading the answer about %s: %w", query, err)
	}
	return nil
}
