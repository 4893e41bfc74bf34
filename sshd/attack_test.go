package sshd

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// These tests speak to a whole server over loopback, as a stranger or a curious
// student would.

// A site is a server that listens, and the keys of people it knows.
type site struct {
	*Server
	addr string
	keys map[string]ssh.Signer
}

// newSite starts a server without runners. Its people are admin, sam (staff), ada
// and bob (students in teams of their own) and guest, whom nobody enrolled.
func newSite(t *testing.T, prepare ...func(*Config)) *site {
	t.Helper()
	c := Config{Dir: t.TempDir(), HostKeys: []ssh.Signer{newSigner(t)}, Store: store.NewMemory(),
		Policy: queue.DefaultPolicy(), Pools: []string{"rai_amd64"}, Guests: true, Log: log.New(io.Discard),
		Limits: map[keys.Role]Limits{keys.Student: {Limits: job.Limits{Time: time.Hour, Output: 1 << 20},
			Upload: 1 << 20, Unpacked: 1 << 22, Entries: 1000}}}
	for _, fn := range prepare {
		fn(&c)
	}
	srv, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l, 5*time.Second) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v, want nil", err)
		}
	})
	s := &site{Server: srv, addr: l.Addr().String(), keys: map[string]ssh.Signer{"guest": newSigner(t)}}
	for _, p := range []keys.Enrollment{{User: "admin", Role: keys.Admin}, {User: "sam", Role: keys.Staff},
		{User: "ada", Role: keys.Student, Team: "team1"}, {User: "bob", Role: keys.Student, Team: "team2"}, {User: "gpu1", Role: keys.Runner}} {
		s.keys[p.User] = newSigner(t)
		p.Key, p.Email = publicLine(s.keys[p.User]), p.User+"@example.edu"
		if _, _, err := srv.Enrol(t.Context(), p, "test"); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func publicLine(s ssh.Signer) string { return string(ssh.MarshalAuthorizedKey(s.PublicKey())) }

// say runs a command as user and returns what came back.
func (s *site) say(t *testing.T, user, command string, stdin io.Reader) (stdout, stderr string, status int) {
	t.Helper()
	c, err := ssh.Dial("tcp", s.addr, &ssh.ClientConfig{User: "rai", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		Auth: []ssh.AuthMethod{ssh.PublicKeys(s.keys[user])}, Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sess, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	sess.Stdin, sess.Stdout, sess.Stderr = stdin, &out, &errOut
	err = sess.Run(command)
	var exit *ssh.ExitError
	if errors.As(err, &exit) {
		return out.String(), errOut.String(), exit.ExitStatus()
	}
	if err != nil {
		t.Fatalf("run %q as %s: %v", command, user, err)
	}
	return out.String(), errOut.String(), 0
}

// Whatever way a role is written, staff make nobody who could be staff themselves.
func TestStaffCannotRaiseAnybody(t *testing.T) {
	s := newSite(t)
	for i, tt := range []struct {
		user, role string
		want       bool
	}{
		{"mallory", "student", true}, {"mallory", " Student ", true}, {"mallory", "POWER", true},
		{"mallory", "admin", false}, {"mallory", "Admin", false}, {"mallory", "\tADMIN ", false},
		{"mallory", "staff", false}, {"mallory", "Staff", false}, {"mallory", "ſtaff", false},
		{"mallory", "Runner", false}, {"gpu9", " runner", false}, {"gpu9", "RUNNER", false},
		{"Admin", "", false}, {" ADMIN\u00a0", "student", false}, {"SAM", "student", false}, {"GPU1", "", false},
	} {
		line := fmt.Sprintf(`{"user":%q,"role":%q,"email":"m@example.edu","key":%q}`, tt.user, tt.role, publicLine(newSigner(t)))
		before := s.book.Users()
		out, _, status := s.say(t, "sam", "admin enroll", strings.NewReader(line+"\n"))
		if (status == 0) != tt.want {
			t.Errorf("%d: enrol %q as %q = %d, %q, want it done: %v", i, tt.user, tt.role, status, out, tt.want)
		}
		if !tt.want && !slices.Equal(s.book.Users(), before) {
			t.Errorf("%d: enrol %q as %q changed the book to %v", i, tt.user, tt.role, s.book.Users())
		}
	}
}

// What somebody typed comes back without a byte that a terminal would obey.
func TestErrorsAreCleanForTerminals(t *testing.T) {
	s := newSite(t)
	for _, command := range []string{"\x1b[31m", "status --\x1b]0;x\a", "status -\u202e", "status \x1b[2J", "help \x1b[2J", "logs 1 -n \x1b[2J",
		"submit -q \x1b", "submit --as \x1b", "submit --name \u202e", "submit --\u009b31m", "history --\a", "admin \x1b", "submit -- echo \x00"} {
		_, stderr, status := s.say(t, "ada", command, nil)
		if status == 0 || strings.ContainsFunc(strings.ReplaceAll(stderr, "\n", ""), hostile) {
			t.Errorf("%q = %d, %q, want an error without control characters", command, status, stderr)
		}
	}
}

// No build file may ask for a box so small that it never starts: that would be
// counted as the runner's fault, three times.
func TestMemoryHasAFloor(t *testing.T) {
	s := newSite(t)
	archive := buildTar(t, "rai: {version: 0.2}\nresources: {limits: {memory: 1}}\ncommands: {build: [\"true\"]}\n")
	out, stderr, status := s.say(t, "ada", "submit --detach", archive)
	if status != 0 {
		t.Fatalf("submit = %d, %q, %q, want 0", status, out, stderr)
	}
	if got := s.brain.Unfinished()[0].Spec.Limits.Memory; got != leastMemory {
		t.Errorf("memory limit = %d, want %d", got, leastMemory)
	}
}

// buildTar makes an upload of one build file.
func buildTar(t *testing.T, text string) io.Reader {
	t.Helper()
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	if err := tw.WriteHeader(&tar.Header{Name: job.BuildFileName, Mode: 0o644, Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, text); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &archive
}
