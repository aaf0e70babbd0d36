package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// probe asks a running container how it is, until ctx ends: it is ready when its readiness probe says so, and one whose
// liveness or startup probe says that it is not well is killed.
func (p *pod) probe(ctx context.Context, c *corev1.Container, r *run) {
	if c.StartupProbe != nil && !p.startup(ctx, c, r) {
		return
	}
	if c.LivenessProbe != nil {
		go p.again(ctx, c.LivenessProbe, func(well bool) {
			if !well {
				r.kill()
			}
		})
	}
	if c.ReadinessProbe == nil {
		p.ready(c.Name, true)
		return
	}
	p.again(ctx, c.ReadinessProbe, func(is bool) { p.ready(c.Name, is) })
}

func (p *pod) startup(ctx context.Context, c *corev1.Container, r *run) bool {
	started, cancel := context.WithCancel(ctx)
	defer cancel()
	is := false
	p.again(started, c.StartupProbe, func(well bool) {
		if is = well; !well {
			r.kill()
		}
		cancel()
	})
	return is
}

// again probes until ctx ends, and tells when the answer is sure: of the thresholds of the probe.
func (p *pod) again(ctx context.Context, probe *corev1.Probe, tell func(bool)) {
	period := time.Duration(max(1, probe.PeriodSeconds)) * time.Second
	if !wait(ctx, time.Duration(probe.InitialDelaySeconds)*time.Second) {
		return
	}
	good, bad := int32(0), int32(0)
	for {
		err := p.ask(ctx, probe)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			good, bad = good+1, 0
		} else {
			good, bad = 0, bad+1
		}
		if good >= max(1, probe.SuccessThreshold) {
			tell(true)
		}
		if bad >= max(1, probe.FailureThreshold) {
			tell(false)
		}
		if !wait(ctx, period) {
			return
		}
	}
}

func (p *pod) ask(ctx context.Context, probe *corev1.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(max(1, probe.TimeoutSeconds))*time.Second)
	defer cancel()
	get := probe.HTTPGet
	if get == nil {
		return errors.New("only probes by HTTP are known here")
	}
	host := get.Host
	if host == "" {
		host = p.hostIP()
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		// From the node, as its kubelet does.
		DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
			err = p.place.Do(func() (err error) {
				conn, err = new(net.Dialer).DialContext(ctx, network, address)
				return err
			})
			return conn, err
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:%d%s", host, get.Port.IntValue(), get.Path), nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode < 200 || answer.StatusCode >= 400 {
		return errors.New(answer.Status)
	}
	return nil
}
