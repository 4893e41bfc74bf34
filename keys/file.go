package keys

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/crypto/ssh"
)

// NewKey makes an ed25519 key. private is in OpenSSH's PEM form without passphrase,
// public is a line in authorized_keys form that ends in comment.
func NewKey(comment string) (private []byte, public string, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, "", fmt.Errorf("make a key: %w", err)
	}
	comment = Clean(comment)
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return nil, "", fmt.Errorf("make a key: %w", err)
	}
	p, err := ssh.NewPublicKey(pub)
	if err != nil {
		return nil, "", fmt.Errorf("make a key: %w", err)
	}
	return pem.EncodeToMemory(block), authorized(p, comment), nil
}

// WriteKey writes a key that NewKey made: path (0600) and path.pub (0644). A private
// key that exists is never overwritten: the error is then fs.ErrExist, wrapped. Each
// file appears whole or not at all.
func WriteKey(path string, private []byte, public string) error {
	if err := writeNew(path, private); err != nil {
		return fmt.Errorf("write key %s: %w", path, err)
	}
	if err := WriteFile(path+".pub", []byte(public+"\n"), 0o644); err != nil {
		os.Remove(path) // half a pair helps nobody
		return err
	}
	return nil
}

// writeNew puts data at path unless something is there.
func writeNew(path string, data []byte) error {
	tmp, err := writeTemp(path, data, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	// A hard link is the one way to name a whole file that never replaces another.
	err = os.Link(tmp, path)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	// A file system without hard links (FAT, some network drives).
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		f.Close()
		os.Remove(path)
		return err
	}
	return f.Close()
}

// WriteFile writes data to path with exactly that mode, replacing a file that is
// there. The file appears whole or not at all.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	tmp, err := writeTemp(path, data, mode)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// tempName is what a file is called until it is whole.
const tempName = ".rai-*"

// Sweep removes what processes that were killed while they wrote a file into dir have
// left there. Nobody may be writing into it.
func Sweep(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, tempName))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// writeTemp writes data to a new file beside path, on the disk when it returns.
func writeTemp(path string, data []byte, mode fs.FileMode) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(path), tempName) // O_EXCL, 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil && runtime.GOOS != "windows" {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// LoadSigner reads a private key. ask is called for the passphrase of a key that has
// one, at most three times; nil means that there is nobody to ask. A file that others
// may read is refused, as ssh(1) does: it is not a secret any more.
func LoadSigner(path string, ask func(path string) ([]byte, error)) (ssh.Signer, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, refuse("name the private key's file", "%s is not a file", path)
	}
	// Windows has no such bits; Go makes them up there.
	if m := info.Mode().Perm(); runtime.GOOS != "windows" && m&0o077 != 0 {
		return nil, refuse("chmod 600 "+path, "the key %s may be read by others (mode %04o)", path, m)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	s, err := ssh.ParsePrivateKey(data)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return unlock(path, data, ask)
	}
	if err != nil {
		return nil, notPrivate(path, data, err)
	}
	return s, nil
}

func unlock(path string, data []byte, ask func(string) ([]byte, error)) (ssh.Signer, error) {
	if ask == nil {
		return nil, refuse("load it into ssh-agent: ssh-add "+path, "the key %s has a passphrase and there is nobody to ask", path)
	}
	for range 3 {
		pass, err := ask(path)
		if err != nil {
			return nil, fmt.Errorf("passphrase of %s: %w", path, err)
		}
		s, err := ssh.ParsePrivateKeyWithPassphrase(data, pass)
		clear(pass)
		if err == nil {
			return s, nil
		}
		if !errors.Is(err, x509.IncorrectPasswordError) {
			return nil, fmt.Errorf("read key %s: %w", path, err)
		}
	}
	return nil, refuse("", "wrong passphrase for %s", path)
}

func notPrivate(path string, data []byte, err error) error {
	if _, e := ParseKey(string(data)); e == nil {
		return refuse("use "+strings.TrimSuffix(path, ".pub"), "%s is a public key; a login needs the private one", path)
	}
	return fmt.Errorf("read key %s: %w", path, err)
}
