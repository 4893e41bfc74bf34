package keys

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// A User is one person or one runner. It is one row of the store.
type User struct {
	Name        string    `json:"name"` // lower case, [a-z0-9._-], unique for ever
	Email       string    `json:"email,omitempty"`
	First       string    `json:"first,omitempty"`
	Last        string    `json:"last,omitempty"`
	Team        string    `json:"team,omitempty"`
	Affiliation string    `json:"affiliation,omitempty"`
	Role        Role      `json:"role"`
	Created     time.Time `json:"created"`
}

// A Key is one public key of a user. It is one row of the store.
type Key struct {
	Fingerprint  string    `json:"fingerprint"` // SHA256:…, as ssh-keygen -l prints it
	User         string    `json:"user"`
	Line         string    `json:"line"` // the key in authorized_keys form, without options
	Comment      string    `json:"comment,omitempty"`
	LoopbackOnly bool      `json:"loopback_only,omitempty"` // counts only from 127.0.0.0/8 and ::1
	Added        time.Time `json:"added"`
}

// A Book is the directory of users and their keys, in memory. It answers every
// login, so it asks nobody; who keeps the rows is the caller's business. A change is
// made in two steps, [Book.Check] before the caller's commit and [Book.Apply] after
// it, so the book never holds what the store does not. The zero Book is empty and
// ready. Its methods are safe for concurrent use; Check and the Apply that belongs
// to it must not interleave with another such pair.
type Book struct {
	// Extra names further roles that may be enrolled, as raid.toml defines them.
	// Set it before the first use.
	Extra []Role

	mu    sync.RWMutex // protects the following
	users map[string]User
	keys  map[string]Key // by fingerprint
}

// Load replaces everything in the book. Keys whose user is not there stay in the
// book but let nobody in.
func (b *Book) Load(users []User, keys []Key) {
	u, k := make(map[string]User, len(users)), make(map[string]Key, len(keys))
	for _, x := range users {
		u[x.Name] = x
	}
	for _, x := range keys {
		k[x.Fingerprint] = x
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.users, b.keys = u, k
}

// Who says whom key belongs to for a client that comes from that address. It proves
// nothing: the caller must have checked the client's signature, or must throw the
// answer away when the signature fails. A certificate is nobody's key.
func (b *Book) Who(key ssh.PublicKey, from netip.Addr) (Identity, bool) {
	fp := ssh.FingerprintSHA256(key)
	b.mu.RLock()
	defer b.mu.RUnlock()
	k, ok := b.keys[fp]
	if !ok || k.LoopbackOnly && !from.Unmap().IsLoopback() {
		return Identity{}, false
	}
	u, ok := b.users[k.User]
	if !ok {
		return Identity{}, false
	}
	return Identity{User: u.Name, Role: u.Role, Team: u.Team, Fingerprint: fp}, true
}

// User returns the user of that name.
func (b *Book) User(name string) (User, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	u, ok := b.users[name]
	return u, ok
}

// Users returns all users by name.
func (b *Book) Users() []User {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return slices.SortedFunc(maps.Values(b.users), func(x, y User) int { return cmp.Compare(x.Name, y.Name) })
}

// Key returns the key with that fingerprint.
func (b *Book) Key(fingerprint string) (Key, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	k, ok := b.keys[fingerprint]
	return k, ok
}

// Keys returns the keys of a user, oldest first.
func (b *Book) Keys(user string) []Key {
	b.mu.RLock()
	defer b.mu.RUnlock()
	var out []Key
	for _, k := range b.keys {
		if k.User == user {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(x, y Key) int {
		return cmp.Or(x.Added.Compare(y.Added), cmp.Compare(x.Fingerprint, y.Fingerprint))
	})
	return out
}

// Apply enters what Check returned and the caller has committed. It does not check
// again.
func (b *Book) Apply(u User, k Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users == nil {
		b.users, b.keys = map[string]User{}, map[string]Key{}
	}
	b.users[u.Name], b.keys[k.Fingerprint] = u, k
}

// Remove strikes a key out, after the caller has committed that. Connections that
// the key has open are the caller's to close.
func (b *Book) Remove(fingerprint string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.keys, fingerprint)
}
