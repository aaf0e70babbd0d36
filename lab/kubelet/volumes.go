package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
)

// volumes are those of a pod.
type volumes struct {
	p    *pod
	dirs map[string]string // by name: where the node has it
}

const accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// makeVolumes makes the volumes of the pod. That of a Secret that is not there is an error, so the pod waits for it.
func (p *pod) makeVolumes(ctx context.Context) (*volumes, error) {
	v := &volumes{p: p, dirs: map[string]string{}}
	for i := range p.spec.Spec.Volumes {
		volume := &p.spec.Spec.Volumes[i]
		dir := filepath.Join(p.o.dir(p.spec), "volumes", volume.Name)
		var err error
		switch {
		case volume.HostPath != nil:
			dir = p.o.HostPath(volume.HostPath.Path)
			err = p.hostPath(dir, volume.HostPath.Type)
		case volume.Secret != nil:
			err = v.fill(ctx, dir, volume)
		case volume.EmptyDir != nil:
			err = os.MkdirAll(dir, 0o777)
		default:
			err = errors.New("a volume of this kind is not known here")
		}
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", volume.Name, err)
		}
		v.dirs[volume.Name] = dir
	}
	if p.account() {
		dir := filepath.Join(p.o.dir(p.spec), "account")
		if err := p.writeAccount(ctx, dir); err != nil {
			return nil, err
		}
		v.dirs[accountDir] = dir
	}
	return v, nil
}

// follow keeps what Secrets hold in the volumes of running containers, as a kubelet does, until ctx ends.
func (v *volumes) follow(ctx context.Context) {
	for wait(ctx, time.Second) {
		for i := range v.p.spec.Spec.Volumes {
			volume := &v.p.spec.Spec.Volumes[i]
			if volume.Secret != nil {
				_ = v.fill(ctx, v.dirs[volume.Name], volume) // what is gone stays as it was
			}
		}
	}
}

// fill writes what a Secret holds, all in one step: files are links to ..data, which is a link to a directory.
func (v *volumes) fill(ctx context.Context, dir string, volume *corev1.Volume) error {
	s := volume.Secret
	if len(s.Items) > 0 {
		return errors.New("chosen keys of a Secret are not known here")
	}
	var secret corev1.Secret
	if err := v.p.o.Cluster.Call(ctx, http.MethodGet, "/api/v1/namespaces/"+v.p.spec.Namespace+"/secrets/"+s.SecretName, nil, &secret); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if s.DefaultMode != nil {
		mode = fs.FileMode(*s.DefaultMode)
	}
	now := filepath.Join(dir, "..data")
	same := func() bool {
		for key, value := range secret.Data {
			if have, err := os.ReadFile(filepath.Join(now, key)); err != nil || string(have) != string(value) {
				return false
			}
		}
		list, err := os.ReadDir(now)
		return err == nil && len(list) == len(secret.Data)
	}
	if same() {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fresh, err := os.MkdirTemp(dir, "..")
	if err != nil {
		return err
	}
	if err := os.Chmod(fresh, 0o755); err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(secret.Data)) {
		if err := os.WriteFile(filepath.Join(fresh, key), secret.Data[key], mode); err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Join(dir, key)); err != nil {
			if err := os.Symlink("..data/"+key, filepath.Join(dir, key)); err != nil {
				return err
			}
		}
	}
	before, _ := os.Readlink(now)
	next := now + "_tmp"
	_ = os.Remove(next)
	if err := os.Symlink(filepath.Base(fresh), next); err != nil {
		return err
	}
	if err := os.Rename(next, now); err != nil {
		return err
	}
	if before != "" {
		return os.RemoveAll(filepath.Join(dir, before))
	}
	return nil
}

// hostPath makes a path of the node, or looks for it, as its type says.
func (p *pod) hostPath(path string, kind *corev1.HostPathType) error {
	here := p.place.Path(path)
	if kind == nil {
		return nil
	}
	switch *kind {
	case corev1.HostPathUnset:
		return nil
	case corev1.HostPathDirectoryOrCreate:
		return os.MkdirAll(here, 0o755)
	case corev1.HostPathFileOrCreate:
		f, err := os.OpenFile(here, os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	}
	info, err := os.Stat(here)
	if err == nil && info.IsDir() != (*kind == corev1.HostPathDirectory) {
		err = fmt.Errorf("%s is no %s", path, *kind)
	}
	return err
}

// account reports whether the pod gets the token of its service account.
func (p *pod) account() bool {
	auto := p.spec.Spec.AutomountServiceAccountToken
	return p.spec.Spec.ServiceAccountName != "" && (auto == nil || *auto)
}

func (p *pod) writeAccount(ctx context.Context, dir string) error {
	token, err := p.o.Cluster.Token(ctx, p.spec.Namespace, p.spec.Spec.ServiceAccountName)
	if err != nil {
		return fmt.Errorf("service account %s: %w", p.spec.Spec.ServiceAccountName, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{"token": token, "ca.crt": string(p.o.Cluster.CA()), "namespace": p.spec.Namespace} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// mounts are a container's volumes, and the files that each container gets.
func (p *pod) mounts(c *corev1.Container, bundle string) ([]specs.Mount, error) {
	var mounts []specs.Mount
	bind := func(source, to string, readonly bool) {
		mounts = append(mounts, specs.Mount{Destination: to, Type: "bind", Source: source, Options: mode(!readonly, "rbind", "rprivate")})
	}
	hosts := filepath.Join(bundle, "hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n::1 localhost\n"), 0o644); err != nil {
		return nil, err
	}
	bind(hosts, "/etc/hosts", false)
	for _, m := range c.VolumeMounts {
		source, ok := p.vols.dirs[m.Name]
		switch {
		case !ok:
			return nil, fmt.Errorf("container %s mounts volume %s, which the pod does not have", c.Name, m.Name)
		case m.SubPath != "" || m.SubPathExpr != "":
			return nil, fmt.Errorf("container %s: a part of volume %s is not known here", c.Name, m.Name)
		}
		bind(source, m.MountPath, m.ReadOnly)
	}
	if dir, ok := p.vols.dirs[accountDir]; ok {
		bind(dir, accountDir, true)
	}
	// A mount within another comes after it.
	slices.SortStableFunc(mounts, func(a, b specs.Mount) int { return strings.Compare(a.Destination, b.Destination) })
	return mounts, nil
}
