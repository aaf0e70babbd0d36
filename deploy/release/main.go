// Release makes what users install, without a Docker daemon and without pulling an image:
//
//	release image     build/image: the image for this machine's architecture, as an OCI archive and as a directory (rootfs)
//	release release   build/release: programs and one OCI archive for all architectures, an SBOM, and SHA256SUMS;
//	                  build/image beside
//
// What the image takes from Debian is fetched by deploy/image/debian: anew for a release, and for image only when that
// script, the list of packages or the names of the archives changed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
)

// architectures are those of a release, by Go's names, which are Debian's too.
var architectures = []string{"amd64", "arm64"}

func main() {
	top := flag.String("top", "../..", "the checkout")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, *top, flag.Arg(0))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, top, what string) error {
	top, err := filepath.Abs(top)
	if err != nil {
		return err
	}
	switch what {
	case "image":
	case "release":
	default:
		return errors.New("say what to make: image or release")
	}
	source, err := describe(ctx, top)
	if err != nil {
		return err
	}
	w := works{top: top, source: source}
	unlock, err := w.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if what == "release" {
		return w.release(ctx)
	}
	p, err := w.part(ctx, runtime.GOARCH, false)
	if err != nil {
		return err
	}
	return w.image(p)
}
