package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// CreateSecret makes a Secret with one key, and reports false where one of that name is there already, whose content is
// not looked at. It needs the right to create Secrets in the namespace, and no other.
func (c *Client) CreateSecret(ctx context.Context, namespace, name, key, value string) (created bool, err error) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, StringData: map[string]string{key: value}}
	err = c.core.Post().Namespace(namespace).Resource("secrets").Body(secret).Do(ctx).Error()
	switch {
	case apierrors.IsAlreadyExists(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("creating secret %s/%s: %w", namespace, name, err)
	}
	return true, nil
}

// awaitEvery is how often AwaitDaemonSet asks.
const awaitEvery = time.Second

// AwaitDaemonSet waits until a pod of the DaemonSet is ready on every node that it is for. said is told how far it is,
// when that changes. It needs the right to get this DaemonSet, and no other.
func (c *Client) AwaitDaemonSet(ctx context.Context, namespace, name string, said func(string)) error {
	last := ""
	for {
		progress, done, err := c.daemonSet(ctx, namespace, name)
		switch {
		case apierrors.IsNotFound(err), apierrors.IsForbidden(err):
			return fmt.Errorf("asking for daemonset %s/%s: %w", namespace, name, err)
		case err != nil:
			progress = err.Error()
		}
		if progress != last {
			said(progress)
			last = progress
		}
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for daemonset %s/%s: %s: %w", namespace, name, last, context.Cause(ctx))
		case <-time.After(awaitEvery):
		}
	}
}

// daemonSet asks once.
func (c *Client) daemonSet(ctx context.Context, namespace, name string) (progress string, done bool, err error) {
	// As JSON, of which these few fields are read: the group's types would make every process larger.
	b, err := c.core.Get().AbsPath("/apis/apps/v1/namespaces", namespace, "daemonsets", name).
		SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return "", false, err
	}
	var d struct {
		Metadata struct{ Generation int64 }
		Status   struct {
			ObservedGeneration                                          int64
			DesiredNumberScheduled, UpdatedNumberScheduled, NumberReady int
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return "", false, err
	}
	if d.Status.ObservedGeneration < d.Metadata.Generation {
		return "not looked at yet", false, nil
	}
	want := d.Status.DesiredNumberScheduled
	ready := min(d.Status.NumberReady, d.Status.UpdatedNumberScheduled)
	return fmt.Sprintf("%d of %d nodes", ready, want), ready >= want, nil
}
