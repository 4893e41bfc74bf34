package dockertest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	dockerimage "github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/registry"
	"golang.org/x/crypto/bcrypt"
)

// A Registry is a real one (Debian's docker-registry) on loopback, which engines speak to
// without TLS.
type Registry struct {
	Addr string // host:port, which its images' names begin with

	user, password string
	cmd            *exec.Cmd
	ended          chan struct{} // closed when it has
}

// StartRegistry starts a registry that keeps its images in dir, at addr, "127.0.0.1:0"
// for a port of its own choice. With a user it asks for that user's password.
func StartRegistry(dir, addr, user, password string) (*Registry, error) {
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		return nil, err
	}
	r := &Registry{user: user, password: password, ended: make(chan struct{})}
	config := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: %q}\n", filepath.Join(dir, "images"), addr)
	if user != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(file, fmt.Appendf(nil, "%s:%s\n", user, hash), 0o600); err != nil {
			return nil, err
		}
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %q}}\n", file)
	}
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	r.cmd = exec.Command(program, "serve", file)
	said, err := r.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	return r, r.start(said)
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

func (r *Registry) start(said io.Reader) error {
	r.cmd.Stdout = r.cmd.Stderr
	if err := r.cmd.Start(); err != nil {
		return err
	}
	var early strings.Builder
	for lines := bufio.NewScanner(said); lines.Scan(); {
		fmt.Fprintln(&early, lines.Text())
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			r.Addr = m[1]
			break
		}
	}
	go func() { // ends with the registry
		defer close(r.ended)
		io.Copy(io.Discard, said)
		r.cmd.Wait()
	}()
	if r.Addr == "" {
		<-r.ended
		return fmt.Errorf("the registry does not start: %s", early.String())
	}
	return nil
}

// Stop ends the registry.
func (r *Registry) Stop() {
	r.cmd.Process.Kill()
	<-r.ended
}

// layer is how many bytes a pull of what Push pushed has to load.
const layer = 8 << 20

// Push puts the lab's image with one more variable and a layer of 8 MiB into a registry as
// REPOSITORY:TAG. What the engine has of that name stays as it is.
func (l *Lab) Push(ctx context.Context, r *Registry, name, env string) (err error) {
	repo, tag, _ := strings.Cut(name, ":")
	const passing = "passing"
	local := r.Addr + "/" + repo + ":" + passing
	if err := l.Make(ctx, local, env); err != nil {
		return fmt.Errorf("make an image: %w", err)
	}
	defer l.Forget(ctx, local)
	auth, err := registry.EncodeAuthConfig(registry.AuthConfig{Username: r.user, Password: r.password, ServerAddress: r.Addr})
	if err != nil {
		return err
	}
	out, err := l.api.ImagePush(ctx, local, dockerimage.PushOptions{RegistryAuth: auth})
	if err != nil {
		return err
	}
	defer out.Close()
	b, err := io.ReadAll(out)
	if err == nil && strings.Contains(string(b), `"error"`) {
		err = errors.New(string(b))
	}
	if err != nil {
		return fmt.Errorf("push %s: %w", local, err)
	}
	return r.name(ctx, repo, passing, tag)
}

// Make makes an image in the engine: the lab's with one more variable and a layer of 8 MiB.
func (l *Lab) Make(ctx context.Context, name, env string) (err error) {
	c, err := l.api.ContainerCreate(ctx, &container.Config{Image: l.Image, Cmd: []string{"true"}}, nil, nil, nil, "")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.api.ContainerRemove(ctx, c.ID, container.RemoveOptions{Force: true, RemoveVolumes: true}))
	}()
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	noise := make([]byte, layer)
	rand.Read(noise)
	err = w.WriteHeader(&tar.Header{Name: "noise", Mode: 0o644, Size: layer})
	_, werr := w.Write(noise)
	if err := errors.Join(err, werr, w.Close()); err != nil {
		return err
	}
	if err := l.api.CopyToContainer(ctx, c.ID, "/", &files, container.CopyToContainerOptions{}); err != nil {
		return err
	}
	_, err = l.api.ContainerCommit(ctx, c.ID, container.CommitOptions{Reference: name, Changes: []string{"ENV " + env}})
	return err
}

// name gives an image of a repository one more tag.
func (r *Registry) name(ctx context.Context, repo, from, to string) error {
	const kind = "application/vnd.docker.distribution.manifest.v2+json"
	url := "http://" + r.Addr + "/v2/" + repo + "/manifests/"
	call := func(method, url string, body io.Reader) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, body)
		if err != nil {
			return nil, err
		}
		req.SetBasicAuth(r.user, r.password)
		req.Header.Set("Accept", kind)
		req.Header.Set("Content-Type", kind)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode/100 != 2 {
			err = fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, b)
		}
		return b, err
	}
	manifest, err := call(http.MethodGet, url+from, nil)
	if err == nil {
		_, err = call(http.MethodPut, url+to, bytes.NewReader(manifest))
	}
	return err
}

// Boxes calls told with the name of each box's image when the box is started, from now
// until ctx ends.
func (l *Lab) Boxes(ctx context.Context, told func(image string)) {
	for e := range l.starts(ctx) {
		told(e.Actor.Attributes["raid.image"])
	}
}

// starts are the containers that are started from now until ctx ends, or the engine.
func (l *Lab) starts(ctx context.Context) iter.Seq[events.Message] {
	now := strconv.FormatInt(time.Now().Unix(), 10)
	said, failed := l.api.Events(ctx, events.ListOptions{Since: now, Filters: filters.NewArgs(filters.Arg("type", "container"), filters.Arg("event", "start"))})
	return func(yield func(events.Message) bool) {
		for {
			select {
			case e := <-said:
				if !yield(e) {
					return
				}
			case <-failed:
				return
			}
		}
	}
}

// Forget removes an image from the engine, if it is there.
func (l *Lab) Forget(ctx context.Context, name string) {
	l.api.ImageRemove(ctx, name, dockerimage.RemoveOptions{Force: true})
}

// ForgetAll removes all images that came from a registry, those that lost their tag to
// a newer one among them.
func (l *Lab) ForgetAll(ctx context.Context, addr string) error {
	all, err := l.api.ImageList(ctx, dockerimage.ListOptions{})
	for _, img := range all {
		if slices.ContainsFunc(slices.Concat(img.RepoTags, img.RepoDigests), func(name string) bool { return strings.HasPrefix(name, addr+"/") }) {
			l.Forget(ctx, img.ID)
		}
	}
	return err
}
