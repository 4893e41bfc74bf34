package dial

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/rai-project/raid/keys"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

// A HostKeyError says that the server could not prove to be the one we want.
type HostKeyError struct {
	Addr        string
	Fingerprint string // of the key that was seen
	Line        string // that key as a line of known_hosts
	Known       bool   // another key is known for Addr: it was changed, or this is an attack
	Revoked     bool
}

func (e *HostKeyError) Error() string {
	switch {
	case e.Revoked:
		return fmt.Sprintf("the host key of %s (%s) is revoked", e.Addr, e.Fingerprint)
	case e.Known:
		return fmt.Sprintf("the host key of %s is not the known one: it showed %s", e.Addr, e.Fingerprint)
	}
	return fmt.Sprintf("the host key of %s is not known: it showed %s", e.Addr, e.Fingerprint)
}

// Hint says what to do about it.
func (e *HostKeyError) Hint() string {
	switch {
	case e.Revoked:
		return "ask the staff; do not connect"
	case e.Known:
		return "somebody may be listening in. If the staff confirm that fingerprint, replace the old line by: " + e.Line
	}
	return "if the staff confirm that fingerprint, add this line to ~/.ssh/known_hosts: " + e.Line
}

// A LoginError says that the server took none of our keys.
type LoginError struct {
	Addr    string
	Offered []string // fingerprints
	Err     error
}

func (e *LoginError) Error() string {
	if len(e.Offered) == 0 {
		return fmt.Sprintf("no key to log in to %s with", e.Addr)
	}
	return fmt.Sprintf("%s does not accept the key %s", e.Addr, strings.Join(e.Offered, ", "))
}

func (e *LoginError) Unwrap() error { return e.Err }

// explain turns what the handshake said into an error of ours.
func explain(t Target, err error) error {
	var host *HostKeyError
	var login *LoginError
	if errors.As(err, &host) {
		return host
	}
	if errors.As(err, &login) {
		return login
	}
	if strings.Contains(err.Error(), "unable to authenticate") { // x/crypto has no type for it
		e := &LoginError{Addr: t.Addr, Err: err}
		for _, s := range t.Signers {
			e.Offered = append(e.Offered, ssh.FingerprintSHA256(s.PublicKey()))
		}
		if len(e.Offered) == 0 && t.Agent {
			e.Offered = []string{"of the agent"}
		}
		return e
	}
	return fmt.Errorf("%w to %s: %w", ErrConnect, t.Addr, err)
}

// config makes the handshake's configuration. trusted is called with the server's key
// once it has passed; cleanup releases the agent.
func config(t Target, trusted func(ssh.PublicKey)) (cfg *ssh.ClientConfig, cleanup func(), err error) {
	check, algorithms, err := pin(t)
	if err != nil {
		return nil, nil, err
	}
	auth, cleanup := login(t)
	user := t.User
	if user == "" {
		user = DefaultUser
	}
	return &ssh.ClientConfig{
		Config: ssh.Config{
			KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519, ssh.KeyExchangeECDHP256},
			// aes128-gcm is the fastest by far where the processor knows AES; chacha20 last, for servers without.
			Ciphers: []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherChaCha20Poly1305},
			MACs:    []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM},
		},
		User:              user,
		Auth:              auth,
		ClientVersion:     "SSH-2.0-rai",
		HostKeyAlgorithms: algorithms,
		HostKeyCallback: func(addr string, remote net.Addr, key ssh.PublicKey) error {
			err := check(addr, remote, key)
			if err == nil {
				trusted(key)
			}
			return err
		},
	}, cleanup, nil
}

// login lists the ways to log in: the given keys first, for a server counts tries.
func login(t Target) ([]ssh.AuthMethod, func()) {
	cleanup := func() {}
	var keyring agent.ExtendedAgent
	if t.Agent {
		if c, err := openAgent(); err == nil {
			keyring, cleanup = agent.NewClient(c), func() { c.Close() }
		}
	}
	return []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
		all := slices.Clone(t.Signers)
		if keyring != nil {
			more, err := keyring.Signers()
			if err != nil && len(all) == 0 {
				return nil, fmt.Errorf("ask the agent: %w", err)
			}
			all = append(all, more...)
		}
		if len(all) == 0 {
			return nil, &LoginError{Addr: t.Addr}
		}
		return all, nil
	})}, cleanup
}

// openAgent connects to the agent. On Windows OpenSSH's is a named pipe, a file.
func openAgent() (io.ReadWriteCloser, error) {
	sock := os.Getenv("SSH_AUTH_SOCK")
	if sock == "" && runtime.GOOS == "windows" {
		return os.OpenFile(`\\.\pipe\openssh-ssh-agent`, os.O_RDWR, 0)
	}
	if sock == "" {
		return nil, errors.New("SSH_AUTH_SOCK is not set")
	}
	return net.Dial("unix", sock)
}

// pin returns the check of the server's key and the algorithms to ask for. Only those
// of known keys are asked for: a server with several keys would else show one that
// nobody has pinned.
func pin(t Target) (ssh.HostKeyCallback, []string, error) {
	var pinned []ssh.PublicKey
	for _, line := range t.HostKeys {
		k, err := parseHostKey(line)
		if err != nil {
			return nil, nil, err
		}
		pinned = append(pinned, k)
	}
	known, err := knownhosts.New(t.KnownHosts...)
	if err != nil {
		return nil, nil, fmt.Errorf("known hosts: %w", err)
	}
	return func(addr string, remote net.Addr, key ssh.PublicKey) error {
		err := known(addr, hostPort(remote, addr), key)
		var revoked *knownhosts.RevokedError
		isPinned := slices.ContainsFunc(pinned, func(k ssh.PublicKey) bool { return bytes.Equal(k.Marshal(), key.Marshal()) })
		if err == nil || isPinned && !errors.As(err, &revoked) {
			return nil
		}
		var unknown *knownhosts.KeyError
		e := &HostKeyError{Addr: addr, Fingerprint: key.Type() + " " + ssh.FingerprintSHA256(key), Line: knownhosts.Line([]string{addr}, key)}
		e.Revoked = errors.As(err, &revoked)
		e.Known = len(pinned) > 0 || errors.As(err, &unknown) && len(unknown.Want) > 0
		return e
	}, withAuthorities(algorithms(known, t.Addr, pinned), t.KnownHosts), nil
}

// withAuthorities puts the algorithms of host certificates first if a file trusts any
// authority: such a server also has plain keys, which nobody knows.
func withAuthorities(plain, files []string) []string {
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte("@cert-authority")) {
			if len(plain) == 0 {
				plain = ssh.SupportedAlgorithms().HostKeys
			}
			certs := []string{ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01}
			return append(certs, plain...)
		}
	}
	return plain
}

// algorithms returns the host key algorithms that fit the keys known for addr, or nil
// for the defaults when none is known and the dial is going to fail anyway.
func algorithms(known ssh.HostKeyCallback, addr string, pinned []ssh.PublicKey) []string {
	types := []string{}
	for _, k := range pinned {
		types = append(types, k.Type())
	}
	// knownhosts has no look-up, but it names the keys it wants when shown a wrong one.
	wrong, _ := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	var unknown *knownhosts.KeyError
	if errors.As(known(addr, hostPort(nil, addr), wrong), &unknown) {
		for _, w := range unknown.Want {
			types = append(types, w.Key.Type())
		}
	}
	var out []string // none: the defaults, to see what the server shows before refusing it
	for _, t := range types {
		algs := []string{t}
		if t == ssh.KeyAlgoRSA {
			algs = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256} // never SHA-1
		}
		for _, a := range algs {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// hostPort returns a remote address that knownhosts can split; a pipe's cannot.
func hostPort(remote net.Addr, addr string) net.Addr {
	if remote != nil {
		if _, _, err := net.SplitHostPort(remote.String()); err == nil {
			return remote
		}
	}
	return textAddr(addr)
}

type textAddr string

func (a textAddr) Network() string { return "tcp" }
func (a textAddr) String() string  { return string(a) }

func parseHostKey(line string) (ssh.PublicKey, error) {
	k, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("host key %.40q: it should look like: ssh-ed25519 AAAA…", line)
	}
	return k, nil
}

// Trust fills in who vouches for the server, for programs a person started. The first
// that applies: the file knownHosts, if named; a host_key.pub beside the identity
// file, which is how raid's own state folder and a course's handout look; the
// person's ~/.ssh/known_hosts. None of them is an error: Dial then says what it saw.
func (t *Target) Trust(knownHosts, identity string) error {
	if knownHosts != "" {
		if _, err := os.Stat(knownHosts); err != nil {
			return fmt.Errorf("known hosts: %w", err)
		}
		t.KnownHosts = []string{knownHosts}
		return nil
	}
	if identity != "" {
		line, err := readLine(filepath.Join(filepath.Dir(identity), "host_key.pub"))
		if err == nil {
			t.HostKeys = append(t.HostKeys, line)
			return nil
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return nil
	}
	if f := filepath.Join(home, ".ssh", "known_hosts"); regular(f) {
		t.KnownHosts = []string{f}
	}
	return nil
}

// Identify fills in the keys to log in with, for programs a person started: the file
// identity, if named; else the agent's and those of ssh(1)'s usual files that need no
// passphrase. ask is as for keys.LoadSigner.
func (t *Target) Identify(identity string, ask func(string) ([]byte, error)) error {
	if identity != "" {
		s, err := keys.LoadSigner(identity, ask)
		if err != nil {
			return err
		}
		t.Signers = append(t.Signers, s)
		return nil
	}
	t.Agent = true
	home, err := os.UserHomeDir()
	if err != nil {
		return nil
	}
	for _, n := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
		if s, err := keys.LoadSigner(filepath.Join(home, ".ssh", n), nil); err == nil {
			t.Signers = append(t.Signers, s)
		}
	}
	return nil
}

func regular(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// readLine reads a small file of one line.
func readLine(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	return strings.TrimSpace(string(b)), err
}
