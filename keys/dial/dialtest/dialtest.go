// Package dialtest is an SSH server in the test's own process, as small as can be: one
// host key, one client key, exec requests that go to a function. It judges as raid
// does why a session was over. It is for tests only and proves nothing about raid.
package dialtest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// A Server runs until its test ends.
type Server struct {
	Addr   string
	Host   ssh.Signer // its key
	Client ssh.Signer // the one key it lets in

	// Left gets a word for each session that is over: "left" if the connection
	// answered afterwards, so the session was closed on purpose, else "lost".
	Left chan string
	// Signals gets the names of signals that clients sent.
	Signals chan string

	handle func(command string, ch ssh.Channel)
	wg     sync.WaitGroup

	mu    sync.Mutex // protects the following
	conns []net.Conn
}

// Serve starts a server whose commands go to handle, which ends a session with Exit or
// not at all. further are more host keys, preferred to its own.
func Serve(t testing.TB, handle func(command string, ch ssh.Channel), further ...ssh.Signer) *Server {
	t.Helper()
	return ServeClient(t, Signer(t), handle, further...)
}

// ServeClient is Serve for a client whose key exists.
func ServeClient(t testing.TB, client ssh.Signer, handle func(command string, ch ssh.Channel), further ...ssh.Signer) *Server {
	t.Helper()
	s := &Server{Host: Signer(t), Client: client, handle: handle, Left: make(chan string, 99), Signals: make(chan string, 99)}
	cfg := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if !bytes.Equal(k.Marshal(), s.Client.PublicKey().Marshal()) {
			return nil, errors.New("unknown key")
		}
		return nil, nil
	}}
	for _, k := range append(further, s.Host) {
		cfg.AddHostKey(k)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Addr = l.Addr().String()
	s.wg.Go(func() { s.accept(l, cfg) })
	t.Cleanup(func() {
		l.Close()
		s.mu.Lock()
		for _, c := range s.conns {
			c.Close()
		}
		s.mu.Unlock()
		s.wg.Wait()
	})
	return s
}

// Signer returns a new ed25519 key.
func Signer(t testing.TB) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Line returns a key's line in authorized_keys form.
func Line(s ssh.Signer) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
}

// Exit ends a session as raid does: status, end of output, close.
func Exit(ch ssh.Channel, status uint32) {
	ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
	ch.CloseWrite()
	ch.Close()
}

func (s *Server) accept(l net.Listener, cfg *ssh.ServerConfig) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns = append(s.conns, c)
		s.mu.Unlock()
		s.wg.Go(func() { s.serve(c, cfg) })
	}
}

func (s *Server) serve(c net.Conn, cfg *ssh.ServerConfig) {
	defer c.Close()
	conn, chans, reqs, err := ssh.NewServerConn(c, cfg)
	if err != nil {
		return
	}
	s.wg.Go(func() { ssh.DiscardRequests(reqs) })
	for n := range chans {
		ch, reqs, err := n.Accept()
		if err != nil {
			continue
		}
		s.wg.Go(func() {
			s.session(ch, reqs)
			// An answer that arrived counts even if the connection has ended since.
			if _, _, err := conn.SendRequest("keepalive@openssh.com", true, nil); err == nil {
				s.Left <- "left"
			} else {
				s.Left <- "lost"
			}
		})
	}
}

func (s *Server) session(ch ssh.Channel, reqs <-chan *ssh.Request) {
	for r := range reqs {
		var p struct{ Text string }
		ssh.Unmarshal(r.Payload, &p)
		r.Reply(true, nil)
		switch r.Type {
		case "exec":
			s.wg.Go(func() { s.handle(p.Text, ch) })
		case "signal":
			s.Signals <- p.Text
		}
	}
}
