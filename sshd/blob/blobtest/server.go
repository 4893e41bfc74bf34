package blobtest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"
)

// A Server is a real S3 server, of a process of its own, behind a wire that can be cut.
type Server struct {
	Access, Secret string
	Addr           string // host:port; plain HTTP

	dir, socket string
	cmd         *exec.Cmd
	stdin       io.Closer
	wire        net.Listener
	wg          sync.WaitGroup
	received    atomic.Int64

	mu    sync.Mutex // guards the following
	state wireState
	moved chan struct{} // closed when state changes
	conns map[net.Conn]bool
	made  int // buckets
}

type wireState int

const (
	works wireState = iota
	hangs
	refuses
)

// StartServer starts a server, which ends with the test.
func StartServer(t testing.TB) *Server {
	t.Helper()
	s, err := NewServer(t.TempDir())
	if err != nil {
		t.Fatalf("start an S3 server: %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// NewServer starts a server that keeps its objects under dir. Close ends it. The program
// is built at the first use on a machine, which takes a minute or so.
func NewServer(dir string) (*Server, error) {
	bin, err := build()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	s := &Server{Access: "tester", Secret: "no/secret+at=all", dir: filepath.Join(dir, "s3"), moved: make(chan struct{}), conns: map[net.Conn]bool{}}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	sockets, err := os.MkdirTemp("", "s3") // a path of a socket has 107 bytes at most
	if err != nil {
		return nil, err
	}
	s.socket = filepath.Join(sockets, "socket")
	s.cmd = exec.Command(bin, s.dir, s.socket, s.Access, s.Secret)
	s.cmd.Stderr = os.Stderr
	if err := s.start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(sockets))
	}
	return s, nil
}

// start waits until the server listens, and joins the wire to it.
func (s *Server) start() error {
	out, err := s.cmd.StdoutPipe()
	if err == nil {
		s.stdin, err = s.cmd.StdinPipe()
	}
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		return err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return fmt.Errorf("%q: %w", line, errors.Join(err, s.cmd.Wait()))
	}
	if s.wire, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return errors.Join(err, s.cmd.Process.Kill(), s.cmd.Wait())
	}
	s.Addr = s.wire.Addr().String()
	s.wg.Go(s.accept)
	return nil
}

// Close ends the server.
func (s *Server) Close() error {
	s.set(refuses)
	s.wire.Close()
	s.stdin.Close()
	err := s.cmd.Wait()
	s.wg.Wait()
	return errors.Join(err, os.RemoveAll(filepath.Dir(s.socket)))
}

// Hang has the wire carry nothing, in connections that there are and in new ones.
func (s *Server) Hang() { s.set(hangs) }

// Refuse cuts all connections and takes no new ones.
func (s *Server) Refuse() { s.set(refuses) }

// Work has the wire work again.
func (s *Server) Work() { s.set(works) }

func (s *Server) set(state wireState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
	close(s.moved)
	s.moved = make(chan struct{})
	for c := range s.conns {
		if state == refuses {
			c.Close()
		}
	}
}

func (s *Server) accept() {
	for {
		c, err := s.wire.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.carry(c) })
	}
}

// carry joins a connection to the server until either side ends it.
func (s *Server) carry(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("unix", s.socket)
	if err != nil {
		return
	}
	defer up.Close()
	if !s.enter(c) {
		return
	}
	defer s.leave(c)
	var wg sync.WaitGroup
	wg.Go(func() { s.copy(up, c, &s.received); up.Close(); c.Close() })
	s.copy(c, up, nil)
	up.Close()
	c.Close()
	wg.Wait()
}

func (s *Server) enter(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = true
	return s.state != refuses
}

func (s *Server) leave(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func (s *Server) copy(to, from net.Conn, count *atomic.Int64) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if count != nil {
			count.Add(int64(n))
		}
		s.pass()
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// pass returns once the wire does not hang.
func (s *Server) pass() {
	for {
		s.mu.Lock()
		state, moved := s.state, s.moved
		s.mu.Unlock()
		if state != hangs {
			return
		}
		<-moved
	}
}

// Received returns how many bytes have come to the server.
func (s *Server) Received() int64 { return s.received.Load() }

// Client returns a client of the server that knows nothing of raid.
func (s *Server) Client() (*minio.Client, error) {
	return minio.New(s.Addr, &minio.Options{Creds: credentials.NewStaticV4(s.Access, s.Secret, ""), Region: "us-east-1"})
}

// NewBucket makes a bucket and returns its name.
func (s *Server) NewBucket(ctx context.Context) (string, error) {
	c, err := s.Client()
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.made++
	name := fmt.Sprintf("bucket-%d", s.made)
	s.mu.Unlock()
	return name, c.MakeBucket(ctx, name, minio.MakeBucketOptions{})
}

// URL returns what [blobs] url would be for a bucket, or for a part of it: "bucket/part".
func (s *Server) URL(bucket string) string {
	return "s3://" + url.UserPassword(s.Access, s.Secret).String() + "@" + bucket + "?endpoint=" + url.QueryEscape("http://"+s.Addr) + "&style=path"
}

// build returns the server program. It is kept for later runs, named by all that it is
// made of.
func build() (string, error) {
	// The path in a binary built with -trimpath is none on this machine.
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "github.com/rai-project/raid/sshd/blob/blobtest").Output()
	if err != nil {
		return "", fmt.Errorf("find the S3 server's source: %w", err)
	}
	src := filepath.Join(strings.TrimSpace(string(dir)), "testdata", "s3server")
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH)
	for _, name := range []string{"go.mod", "go.sum", "main.go"} {
		text, err := os.ReadFile(filepath.Join(src, name))
		if err != nil {
			return "", err
		}
		h.Write(text)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	kept := filepath.Join(cache, "raid-test")
	bin := filepath.Join(kept, fmt.Sprintf("s3server-%x", h.Sum(nil)[:8]))
	if err := os.MkdirAll(kept, 0o755); err != nil {
		return "", err
	}
	// Tests of several packages may be the first at once, and this takes a while.
	lock, err := os.OpenFile(bin+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(bin); !errors.Is(err, fs.ErrNotExist) {
		return bin, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	fresh := fmt.Sprintf("%s.%d", bin, os.Getpid())
	cmd := exec.CommandContext(ctx, "go", "build", "-o", fresh, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -trimpath", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the S3 server: %w\n%s", err, strings.TrimSpace(string(out)))
	}
	return bin, os.Rename(fresh, bin)
}
