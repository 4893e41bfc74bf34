package door

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// A user is somebody with ssh(1), a folder of keys and no agent.
type user struct {
	dir  string
	args []string
}

func (h *house) user(t testing.TB) *user {
	t.Helper()
	tool(t, "ssh")
	_, port, _ := net.SplitHostPort(h.addr)
	u := &user{dir: t.TempDir()}
	u.args = []string{"-F", "none", "-p", port, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "IdentityAgent=none", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-l", "rai", "127.0.0.1"}
	return u
}

// key makes a key of some type and gives its path and its public part.
func (u *user) key(t testing.TB, name string, args ...string) (string, ssh.PublicKey) {
	t.Helper()
	path := filepath.Join(u.dir, name)
	args = append([]string{"-q", "-N", "", "-f", path}, args...)
	if out, err := exec.Command(tool(t, "ssh-keygen"), args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v: %s", args, err, out)
	}
	text, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return path, pub
}

func (u *user) ssh(args ...string) *exec.Cmd {
	return exec.Command("ssh", append(args[:len(args):len(args)], u.args...)...)
}

// People with several keys get in with the enrolled one, whatever its place; people
// with none that is enrolled are guests with the first.
func TestGuestsWithSSH(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		fmt.Fprint(s, s.Who.Role, " ", s.Who.Fingerprint)
		return 0
	}})
	u := h.user(t)
	student, pub := u.key(t, "student", "-t", "ed25519")
	h.mu.Lock()
	h.ada = publicOnly{pub}
	h.mu.Unlock()
	var strangers []string
	for i := range 8 {
		path, _ := u.key(t, fmt.Sprint("stranger", i), "-t", "ed25519")
		strangers = append(strangers, path)
	}
	_, first := u.key(t, "first", "-t", "ecdsa")
	tests := []struct {
		name string
		ids  []string
		who  string
	}{
		{"one enrolled key", []string{student}, "student " + ssh.FingerprintSHA256(pub)},
		{"one unknown key", []string{filepath.Join(u.dir, "first")}, "guest " + ssh.FingerprintSHA256(first)},
		{"unknown, enrolled", []string{strangers[0], student}, "student " + ssh.FingerprintSHA256(pub)},
		{"enrolled, unknown", []string{student, strangers[0]}, "student " + ssh.FingerprintSHA256(pub)},
		{"eight unknown, enrolled", append(strangers[:8:8], student), "student " + ssh.FingerprintSHA256(pub)},
		{"nine unknown", append([]string{filepath.Join(u.dir, "first")}, strangers...), "guest " + ssh.FingerprintSHA256(first)},
	}
	for _, tt := range tests {
		for _, public := range []bool{true, false} { // ssh asks first if it has the public part
			t.Run(fmt.Sprintf("%s, .pub %v", tt.name, public), func(t *testing.T) {
				dir := t.TempDir()
				args := []string{"-o", "IdentitiesOnly=yes"}
				for _, id := range tt.ids {
					to := filepath.Join(dir, filepath.Base(id))
					copyFile(t, id, to)
					if public {
						copyFile(t, id+".pub", to+".pub")
					}
					args = append(args, "-i", to)
				}
				cmd := u.ssh(args...)
				out, err := cmd.CombinedOutput()
				if err != nil || string(out) != tt.who {
					t.Errorf("ssh with %s: %s, %v; want %s", tt.name, out, err, tt.who)
				}
			})
		}
	}
	t.Run("agent before -i", func(t *testing.T) {
		agent := startAgent(t, strangers[:3])
		cmd := u.ssh("-i", student, "-o", "IdentityAgent="+agent)
		out, err := cmd.CombinedOutput()
		if want := "student " + ssh.FingerprintSHA256(pub); err != nil || string(out) != want {
			t.Errorf("ssh -i with an agent: %s, %v; want %s", out, err, want)
		}
	})
	if log := h.logged(); log != "" {
		t.Errorf("log of logins that worked: %s, want nothing", log)
	}
}

// publicOnly is a Signer for comparing only.
type publicOnly struct{ key ssh.PublicKey }

func (p publicOnly) PublicKey() ssh.PublicKey { return p.key }
func (p publicOnly) Sign(io.Reader, []byte) (*ssh.Signature, error) {
	return nil, errors.New("no private key")
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func startAgent(t *testing.T, ids []string) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "agent")
	agent := exec.Command(tool(t, "ssh-agent"), "-D", "-a", sock)
	out, err := agent.StdoutPipe() // it prints its address once it listens
	if err == nil {
		err = agent.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Process.Kill(); agent.Wait() })
	if _, err := out.Read(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		add := exec.Command("ssh-add", "-q", id)
		add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+sock)
		if out, err := add.CombinedOutput(); err != nil {
			t.Fatalf("ssh-add: %v: %s", err, out)
		}
	}
	return sock
}

// Without guests an unknown key is refused, and fail2ban gets one line.
func TestRefusedWithSSH(t *testing.T) {
	cfg := Config{}
	cfg.Authorize = refuseAll
	h := open(t, cfg)
	u := h.user(t)
	id, pub := u.key(t, "id", "-t", "ed25519")
	out, err := u.ssh("-i", id, "-o", "IdentitiesOnly=yes").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Permission denied (publickey)") {
		t.Errorf("ssh: %s, %v; want permission denied", out, err)
	}
	h.Shutdown(t.Context())
	log := h.logged()
	if strings.Count(log, "\n") != 0 || !strings.HasPrefix(log, "authentication failure from 127.0.0.1 port ") ||
		!strings.HasSuffix(log, " key "+ssh.FingerprintSHA256(pub)+` user "rai"`) {
		t.Errorf("log = %q, want one authentication failure", log)
	}
}

// Short RSA keys are refused, long ones work, SHA-1 is not used.
func TestRSAWithSSH(t *testing.T) {
	h := open(t, Config{})
	u := h.user(t)
	short, _ := u.key(t, "short", "-t", "rsa", "-b", "1024")
	long, _ := u.key(t, "long", "-t", "rsa", "-b", "2048")
	if out, err := u.ssh("-i", short, "-o", "IdentitiesOnly=yes", "-o", "RequiredRSASize=1024").CombinedOutput(); err == nil {
		t.Errorf("a 1024 bit key got in: %s", out)
	}
	if out, err := u.ssh("-i", long, "-o", "IdentitiesOnly=yes").CombinedOutput(); err != nil {
		t.Errorf("a 2048 bit key did not get in: %v: %s", err, out)
	}
}

// What ends an ssh(1) tells apart who left and who was lost.
func TestCausesWithSSH(t *testing.T) {
	running, cause := make(chan bool, 1), make(chan error, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		if s.Command == "true" {
			return 0
		}
		running <- true
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return 1
	}})
	u := h.user(t)
	id, _ := u.key(t, "id", "-t", "ed25519")
	args := []string{"-i", id, "-o", "IdentitiesOnly=yes"}
	for _, tt := range []struct {
		signal syscall.Signal
		want   error
	}{
		{syscall.SIGINT, ErrLeft},
		{syscall.SIGTERM, ErrLeft},
		{syscall.SIGHUP, ErrLeft},
		{syscall.SIGKILL, ErrLost},
	} {
		t.Run(tt.signal.String(), func(t *testing.T) {
			cmd := u.ssh(args...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			receive(t, running, "session")
			cmd.Process.Signal(tt.signal)
			if got := receive(t, cause, "end"); got != tt.want {
				t.Errorf("cause = %v, want %v", got, tt.want)
			}
			cmd.Wait()
		})
	}
	// ControlMaster: the connection outlives the session (defect f).
	path := filepath.Join(t.TempDir(), "mux")
	muxed := append(args, "-S", path)
	master := u.ssh(append(muxed, "-M", "-N")...)
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { master.Process.Kill(); master.Wait() }()
	waitFile(t, path)
	for _, tt := range []struct {
		signal syscall.Signal
		want   error
	}{
		{syscall.SIGINT, ErrLeft},
		{syscall.SIGKILL, ErrLeft}, // its master lives and says so
	} {
		t.Run("ControlMaster, "+tt.signal.String(), func(t *testing.T) {
			cmd := u.ssh(muxed...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			receive(t, running, "session")
			cmd.Process.Signal(tt.signal)
			if got := receive(t, cause, "end"); got != tt.want {
				t.Errorf("cause = %v, want %v", got, tt.want)
			}
			cmd.Wait()
			other := u.ssh(muxed...)
			other.Args = append(other.Args, "true")
			if out, err := other.CombinedOutput(); err != nil {
				t.Errorf("next session on the connection: %v: %s", err, out)
			}
		})
	}
	t.Run("ControlMaster killed", func(t *testing.T) {
		cmd := u.ssh(muxed...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		receive(t, running, "session")
		master.Process.Kill()
		if got := receive(t, cause, "end"); got != ErrLost {
			t.Errorf("cause = %v, want %v", got, ErrLost)
		}
		cmd.Wait()
	})
}

// waitFile waits until path exists; only another process makes it, and tells nobody.
func waitFile(t *testing.T, path string) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("no %s", path)
		}
	}
}

// Megabytes both ways, with a cipher of each kind, exit status at the end.
func TestBulkWithSSH(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		n, err := io.Copy(s, s)
		fmt.Fprint(s.Stderr(), n, err)
		return 9
	}})
	u := h.user(t)
	id, _ := u.key(t, "id", "-t", "ed25519")
	data := make([]byte, 20<<20+12345)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	for _, cipher := range []string{"aes128-gcm@openssh.com", "aes256-ctr"} {
		cmd := u.ssh("-i", id, "-o", "IdentitiesOnly=yes", "-c", cipher)
		cmd.Stdin = bytes.NewReader(data)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		if !bytes.Equal(out.Bytes(), data) {
			t.Errorf("%s: %d bytes came back changed, want %d", cipher, out.Len(), len(data))
		}
		if got, want := errs.String(), fmt.Sprint(len(data), nil); got != want {
			t.Errorf("%s: stderr = %q, want %q", cipher, got, want)
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 9 {
			t.Errorf("%s: ssh ended with %v, want 9", cipher, err)
		}
	}
}

// What a default client asks for besides a command is refused without harm.
func TestExtrasWithSSH(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { fmt.Fprint(s, "ok"); return 0 }})
	u := h.user(t)
	id, _ := u.key(t, "id", "-t", "ed25519")
	agent := startAgent(t, nil)
	cmd := u.ssh("-i", id, "-A", "-o", "IdentityAgent="+agent, "-tt", "-o", "SetEnv=FOO=bar")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "ok") {
		t.Errorf("ssh -A -tt: %q, %v; want ok", out, err)
	}
	forward := u.ssh("-i", id, "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1")
	if out, err := forward.CombinedOutput(); err == nil {
		t.Errorf("ssh -R worked: %q", out)
	}
	cmd = u.ssh("-i", id, "-s")
	cmd.Args = append(cmd.Args, "sftp")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "subsystem request failed") {
		t.Errorf("sftp: %q, %v; want a refusal", out, err)
	}
}

// refuseAll is the Authorize of a house without guests where nobody is enrolled.
func refuseAll(context.Context, ssh.PublicKey, netip.AddrPort) (keys.Identity, error) {
	return keys.Identity{}, errRefused
}
