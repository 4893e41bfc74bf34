// Package dockertest finds a Docker engine for tests, or starts one, and gives it an
// image, for there may be no registry to get one from.
package dockertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	dockerimage "github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"

	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
)

// A Lab is an engine with an image in it.
type Lab struct {
	Host  string // for DOCKER_HOST
	Image string // holds boxtest's root and FROM_IMAGE=yes

	api  *client.Client
	stop func()
	dir  string // of an engine of its own
}

// Open prepares a lab, or says what is missing for one. more are programs whose
// libraries the image must hold.
func Open(more ...string) (*Lab, error) {
	host, stop, err := engine()
	if err != nil {
		return nil, err
	}
	return open(host, stop, more)
}

// OpenAlone is Open with an engine of the lab's own, whatever runs on the machine: all
// that is in it is of whoever opened it. It takes root and some seconds. No registry of
// the machine's can be reached from it.
func OpenAlone(more ...string) (*Lab, error) {
	dockerd, err := exec.LookPath("dockerd")
	if err != nil || os.Geteuid() != 0 {
		return nil, errors.New("an engine of one's own takes dockerd and root")
	}
	host, stop, err := startEngine(dockerd)
	if err != nil {
		return nil, err
	}
	l, err := open(host, stop, more)
	if err == nil {
		l.dir = filepath.Dir(strings.TrimPrefix(host, "unix://"))
	}
	return l, err
}

func open(host string, stop func(), more []string) (_ *Lab, err error) {
	l := &Lab{Host: host, Image: fmt.Sprintf("raid-test-%d:latest", os.Getpid()), stop: stop}
	if l.api, err = client.NewClientWithOpts(client.WithHost(l.Host), client.WithAPIVersionNegotiation()); err != nil {
		l.stop()
		return nil, err
	}
	if err := l.load(more); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close removes the image, and the engine if Open started it.
func (l *Lab) Close() error {
	_, err := l.api.ImageRemove(context.Background(), l.Image, dockerimage.RemoveOptions{Force: true})
	l.api.Close()
	l.stop()
	return err
}

// Containers returns the names of containers with a label, "name=value", dead or alive.
func (l *Lab) Containers(ctx context.Context, label string) (names []string, err error) {
	all, err := l.api.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", label))})
	for _, c := range all {
		names = append(names, c.Names...)
	}
	return names, err
}

// engine finds the engine of this machine, or starts one of its own.
func engine() (host string, stop func(), err error) {
	host = os.Getenv("DOCKER_HOST")
	if docker.Answers(context.Background(), host) {
		if host == "" {
			host = client.DefaultDockerHost
		}
		return host, func() {}, nil
	}
	if host != "" {
		return "", nil, fmt.Errorf("no engine answers at DOCKER_HOST=%s", host)
	}
	dockerd, err := exec.LookPath("dockerd")
	if err != nil {
		return "", nil, errors.New("dockerd is not installed")
	}
	if os.Geteuid() != 0 {
		return "", nil, errors.New("no Docker engine answers, and only root can start one")
	}
	return startEngine(dockerd)
}

func startEngine(dockerd string) (host string, stop func(), err error) {
	dir, err := os.MkdirTemp("/var/tmp", "raid-dockerd-")
	if err != nil {
		return "", nil, err
	}
	host = "unix://" + filepath.Join(dir, "docker.sock")
	// Where containerd runs already, this engine is to see nothing of others in it.
	space := filepath.Base(dir)
	config := filepath.Join(dir, "daemon.json") // the machine's own may say otherwise
	if err := os.WriteFile(config, []byte("{}"), 0o600); err != nil {
		return "", nil, err
	}
	var said bytes.Buffer
	cmd := exec.Command(dockerd, "--config-file", config, "--iptables=false", "--ip6tables=false", "--bridge=none", "-H", host,
		"--containerd-namespace", space, "--containerd-plugins-namespace", space+"-plugins",
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"))
	cmd.Stdout, cmd.Stderr = &said, &said
	// In a network of its own: a dockerd that is to have no bridge removes the machine's
	// docker0, whoever else uses it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	stop = func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		os.RemoveAll(dir)
	}
	for tick := time.NewTicker(100 * time.Millisecond); ; <-tick.C {
		select {
		case <-ended:
			os.RemoveAll(dir)
			return "", nil, fmt.Errorf("dockerd does not start: %s", said.String())
		default:
		}
		if docker.Answers(context.Background(), host) {
			return host, stop, nil
		}
	}
}

// load makes an image of this machine's own programs.
func (l *Lab) load(more []string) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(boxtest.WriteRoot(w, more...)) }()
	defer r.Close()
	out, err := l.api.ImageImport(context.Background(), dockerimage.ImportSource{Source: r, SourceName: "-"}, l.Image,
		dockerimage.ImportOptions{Changes: []string{"ENV FROM_IMAGE=yes", "ENV GODEBUG=http2debug=2", "ENV NVIDIA_VISIBLE_DEVICES=all", "VOLUME /data", "USER 1234", "ENTRYPOINT [\"false\"]"}})
	if err != nil {
		return fmt.Errorf("import an image: %w", err)
	}
	defer out.Close()
	b, err := io.ReadAll(out)
	if err == nil && strings.Contains(string(b), "error") {
		err = errors.New(string(b))
	}
	if err != nil {
		return fmt.Errorf("import an image: %w", err)
	}
	return nil
}
