package door

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys/dial/dialtest"
)

// benchHandler takes "up" (stdin), "down N" (bytes) and nothing.
func benchHandler(ctx context.Context, s *Session) int {
	var n int64
	switch {
	case s.Command == "up":
		io.CopyBuffer(struct{ io.Writer }{io.Discard}, s, make([]byte, 256<<10))
	case s.Command == "idle":
		s.Write(make([]byte, livePacket))
		<-ctx.Done()
	case s.Command == "bulk-idle":
		s.Write(make([]byte, livePacket))
		s.Write(make([]byte, bulkPacket))
		<-ctx.Done()
	case len(s.Command) > 5:
		fmt.Sscanf(s.Command, "down %d", &n)
		io.CopyBuffer(struct{ io.Writer }{s}, io.LimitReader(zeros{}, n), make([]byte, 256<<10))
	}
	return 0
}

// Login and a trivial command with a Go client in the same process.
func BenchmarkLogin(b *testing.B) {
	h := open(b, Config{Handle: benchHandler})
	for b.Loop() {
		c, err := ssh.Dial("tcp", h.addr, clientConfig("rai", h.ada))
		if err != nil {
			b.Fatal(err)
		}
		if err := session(b, c).Run("true"); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

// A trivial command on a connection that is there.
func BenchmarkSession(b *testing.B) {
	h := open(b, Config{Handle: benchHandler})
	c := h.dial(b, h.ada)
	for b.Loop() {
		if err := session(b, c).Run("true"); err != nil {
			b.Fatal(err)
		}
	}
}

// opensshd runs the system's sshd for one user with one key and returns its port.
func opensshd(b *testing.B, u *user, authorized string) string {
	b.Helper()
	path := "/usr/sbin/sshd"
	if _, err := os.Stat(path); err != nil || os.Getuid() != 0 {
		b.Skip("no sshd, or not root")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	os.MkdirAll("/run/sshd", 0o755)
	host, _ := u.key(b, "sshd_host", "-t", "ed25519")
	cfg := filepath.Join(u.dir, "sshd_config")
	text := fmt.Sprintf("Port %s\nListenAddress 127.0.0.1\nHostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n", port, host, authorized)
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(path, "-D", "-e", "-f", cfg)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for deadline := time.Now().Add(patience); ; {
		nc, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			nc.Close()
			return port
		}
		if time.Now().After(deadline) {
			b.Fatal("sshd does not listen")
		}
	}
}

// ssh(1) against this package and against the system's sshd: login, upload, download.
func BenchmarkSSH(b *testing.B) {
	h := open(b, Config{Handle: benchHandler})
	u := h.user(b)
	id, _ := u.key(b, "id", "-t", "ed25519")
	port := opensshd(b, u, id+".pub")
	const size = 256 << 20
	data := make([]byte, size)
	gcm := []string{"-c", "aes128-gcm@openssh.com"}
	for _, bb := range []struct {
		name    string
		args    []string
		command [2]string // here, and with sshd
		in, out int64
	}{
		{"login", nil, [2]string{"true", "true"}, 0, 0},
		{"upload-gcm", gcm, [2]string{"up", "cat > /dev/null"}, size, 0},
		{"upload-default", nil, [2]string{"up", "cat > /dev/null"}, size, 0},
		{"download-gcm", gcm, [2]string{"down " + strconv.Itoa(size), "head -c " + strconv.Itoa(size) + " /dev/zero"}, 0, size},
		{"download-default", nil, [2]string{"down " + strconv.Itoa(size), "head -c " + strconv.Itoa(size) + " /dev/zero"}, 0, size},
	} {
		for i, server := range []string{"raid", "sshd"} {
			b.Run(bb.name+"/"+server, func(b *testing.B) {
				b.SetBytes(bb.in + bb.out)
				var times []time.Duration
				for b.Loop() {
					cmd := u.ssh(append(bb.args, "-i", id, "-o", "IdentitiesOnly=yes")...)
					if server == "sshd" { // the first -p and user count
						cmd = u.ssh(append(bb.args, "-i", id, "-o", "IdentitiesOnly=yes", "-p", port, "-l", "root")...)
					}
					cmd.Args = append(cmd.Args, bb.command[i])
					if bb.in > 0 {
						cmd.Stdin = bytes.NewReader(data)
					}
					var n counter
					cmd.Stdout = &n
					times = append(times, after(func() {
						if err := cmd.Run(); err != nil || int64(n) != bb.out {
							b.Fatalf("ssh: %v, %d bytes", err, n)
						}
					}))
				}
				slices.Sort(times)
				b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "ms-median")
			})
		}
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// idleClients is how many sessions BenchmarkIdleMemory holds.
const idleClients = 1000

// Memory of a session that has sent some output and waits, and as much again after it
// has sent a bulk. The clients are another process.
func BenchmarkIdleMemory(b *testing.B) {
	for _, command := range []string{"idle", "bulk-idle"} {
		b.Run(command, func(b *testing.B) {
			h := open(b, Config{Handle: benchHandler})
			for b.Loop() {
				before := memory()
				cmd := exec.Command(os.Args[0], "-test.run=^TestIdleClients$")
				cmd.Env = append(os.Environ(), "DOOR_CLIENTS="+h.addr, "DOOR_COMMAND="+command)
				in, _ := cmd.StdinPipe()
				out, _ := cmd.StdoutPipe()
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				io.ReadFull(out, make([]byte, 1))
				b.ReportMetric((memory()-before)/idleClients/1024, "KiB/session")
				in.Close()
				cmd.Wait()
			}
		})
	}
}

func memory() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// TestIdleClients is the other process of BenchmarkIdleMemory.
func TestIdleClients(t *testing.T) {
	addr := os.Getenv("DOOR_CLIENTS")
	if addr == "" {
		t.Skip("only for BenchmarkIdleMemory")
	}
	h := &house{addr: addr}
	key := dialtest.Signer(t)
	for range idleClients {
		s := session(t, h.dial(t, key))
		out, _ := s.StdoutPipe()
		if err := s.Start(os.Getenv("DOOR_COMMAND")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, livePacket)); err != nil {
			t.Fatal(err)
		}
	}
	os.Stdout.WriteString("!")
	io.Copy(io.Discard, os.Stdin)
}
