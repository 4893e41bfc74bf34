package door

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// maxAuthTries is how many keys a client may have refused. OpenSSH's 6 fails people
// with a full agent; looking a key up costs next to nothing, and guessing keys is no
// threat.
const maxAuthTries = 20

// minRSABits is the shortest RSA key that may log in.
const minRSABits = 2048

// A login is one connection's way through authentication. All of it runs in the
// handshake's goroutine.
//
// # Guests and the first key
//
// A client offers its keys one by one and uses the first one the server takes. If an
// unknown key were simply taken as a guest's, a student whose agent holds any other
// key would never get to the enrolled one: OpenSSH offers the agent's keys before
// those of -i. Refusing unknown keys first does not help either, for a client that
// has run out of keys just hangs up.
//
// So an unknown key of an OpenSSH client is asked for its signature and answered with
// "partial success" (RFC 4252 §5.1), which makes OpenSSH offer all its keys again,
// the one it has just used last. An enrolled key is then met first and taken; when
// the same unknown key comes round again there was nothing better, and its owner is a
// guest. The price is one more signature, and only for people who have an unknown
// key. Other clients are not known to turn their keys that way; they are guests with
// their first unknown key and can be told to offer one key only.
type login struct {
	ctx       context.Context
	from      netip.AddrPort
	authorize func(context.Context, ssh.PublicKey, netip.AddrPort) (keys.Identity, error)
	isRaid    func(context.Context, ssh.PublicKey) bool // nil: nobody is
	logf      func(string, ...any)
	admitted  func(keys.Identity) // called once, when a key has proved itself

	fallback string // fingerprint of the unknown key that may come in when it is offered again
	last     string // fingerprint of the last key offered
	user     string // last login name, for the log
	asked    bool   // the client has asked to be let in
	done     bool
}

// proofKey finds the proof in ssh.Permissions.ExtraData.
type proofKey struct{}

// A proof is who a client has shown to be, and by which key.
type proof struct {
	who keys.Identity
	key ssh.PublicKey
}

var (
	errRefused = errors.New("permission denied")
	errWeak    = fmt.Errorf("RSA key is shorter than %d bits", minRSABits)
)

// config is what golang.org/x/crypto/ssh runs the handshake with. It offers one way
// in: a public key.
func (l *login) config() *ssh.ServerConfig {
	return &ssh.ServerConfig{
		Config: ssh.Config{
			KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519, "curve25519-sha256@libssh.org", ssh.KeyExchangeECDHP256},
			// No chacha20-poly1305: clients prefer it, and it is three to six
			// times slower than GCM on any machine with AES instructions.
			Ciphers: []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR},
			MACs:    []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM},
		},
		PublicKeyAuthAlgorithms: []string{
			ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
			ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
			ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
		},
		MaxAuthTries: maxAuthTries,
		// Never asked while NoClientAuth is false; there for the day it is not
		// (defect a).
		NoClientAuthCallback: func(ssh.ConnMetadata) (*ssh.Permissions, error) { return nil, errRefused },
		AuthLogCallback: func(meta ssh.ConnMetadata, method string, err error) {
			l.asked, l.user = true, meta.User()
		},
		VerifiedPublicKeyCallback: l.verified,
	}
}

// offer decides whether key may be used, before any proof that the client holds it.
// The Permissions are this key's alone.
func (l *login) offer(key ssh.PublicKey) (*ssh.Permissions, error) {
	l.last = ssh.FingerprintSHA256(plain(key))
	who, err := l.lookUp(key)
	if err != nil {
		return &ssh.Permissions{}, err
	}
	if who.Role == keys.Guest && l.fallback != "" && l.fallback != l.last {
		return &ssh.Permissions{}, errRefused // it has shown a key already; go on to the next
	}
	perms := &ssh.Permissions{ExtraData: map[any]any{proofKey{}: proof{who, key}}}
	if cert, ok := key.(*ssh.Certificate); ok {
		if where, ok := cert.CriticalOptions["source-address"]; ok {
			// x/crypto enforces it only if it is handed over (CVE-2026-46595).
			perms.CriticalOptions = map[string]string{"source-address": where}
		}
	}
	return perms, nil
}

// lookUp asks Authorize, and of whom that does not know, IsRaid, for keys that are strong
// enough. A panic refuses the key.
func (l *login) lookUp(key ssh.PublicKey) (who keys.Identity, err error) {
	defer func() {
		if p := recover(); p != nil {
			l.logf("panic in Authorize: %v", p)
			err = errRefused
		}
	}()
	if weak(key) {
		return who, errWeak
	}
	who, err = l.authorize(l.ctx, key, l.from)
	if (err != nil || who.Role == keys.Guest) && l.isRaid != nil && l.isRaid(l.ctx, key) {
		who, err = keys.Identity{User: "raid", Role: keys.Door, Fingerprint: l.last}, nil
	}
	if who.Fingerprint == "" {
		who.Fingerprint = l.last
	}
	return who, err
}

// verified runs when the client has proved that it holds key. perms are what offer
// returned for it.
func (l *login) verified(meta ssh.ConnMetadata, key ssh.PublicKey, perms *ssh.Permissions, _ string) (*ssh.Permissions, error) {
	p, ok := proven(perms)
	if !ok {
		return nil, errRefused
	}
	who := p.who
	if who.Role == keys.Guest && l.fallback == "" && turnsItsKeys(meta.ClientVersion()) {
		l.fallback = ssh.FingerprintSHA256(plain(key))
		again := func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) { return l.offer(key) }
		return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{PublicKeyCallback: again}}
	}
	l.done, l.user = true, meta.User()
	l.admitted(who)
	return perms, nil
}

// report writes the line for fail2ban about a client that asked and was not let in.
func (l *login) report() {
	if l.done || !l.asked {
		return
	}
	key := l.last
	if key == "" {
		key = "none"
	}
	l.logf("authentication failure from %s port %d key %s user %s", l.from.Addr(), l.from.Port(), key, quoted(l.user))
}

// proven is what perms were made for.
func proven(perms *ssh.Permissions) (proof, bool) {
	if perms == nil {
		return proof{}, false
	}
	p, ok := perms.ExtraData[proofKey{}].(proof)
	return p, ok
}

// turnsItsKeys says that the client, on partial success, offers its keys again with
// the one used last at the end: OpenSSH since 6.2, on every system.
func turnsItsKeys(version []byte) bool {
	return strings.HasPrefix(string(version), "SSH-2.0-OpenSSH_")
}

// plain is the key a certificate is about, or the key itself.
func plain(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

func weak(key ssh.PublicKey) bool {
	k, ok := plain(key).(ssh.CryptoPublicKey)
	if !ok {
		return false
	}
	pub, ok := k.CryptoPublicKey().(*rsa.PublicKey)
	return ok && pub.N.BitLen() < minRSABits
}

// quoted makes a stranger's text safe for one line of log.
func quoted(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most]
	}
	return strconv.QuoteToASCII(s)
}
