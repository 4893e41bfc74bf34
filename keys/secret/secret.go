// Package secret keeps secrets in raid.toml unreadable to whoever reads the file.
//
// A secret is encrypted to raid's host key and written as "age:" and base64, on one
// line. Whoever has DIR/host_key.pub can make one; only raid, which has DIR/host_key,
// can read it, so there is no further key to guard. The format is age's (C2SP
// age-encryption.org/v1) with an ssh-ed25519 recipient: authenticated, unlike what RAI
// did. Non-goals: passphrases, and hiding a secret from whoever holds the state folder.
package secret

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
)

// Prefix begins every encrypted secret.
const Prefix = "age:"

// maxText bounds a secret; it is a password or an address, not a file.
const maxText = 16 << 10

// Is reports whether text is an encrypted secret.
func Is(text string) bool { return strings.HasPrefix(text, Prefix) }

// Encrypt encrypts text to a public key in authorized_keys form.
func Encrypt(text, public string) (string, error) {
	if len(text) > maxText {
		return "", fmt.Errorf("a secret has at most %d bytes", maxText)
	}
	to, err := agessh.ParseRecipient(strings.TrimSpace(public))
	if err != nil {
		return "", fmt.Errorf("public key: %w", err)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to)
	if err != nil {
		return "", fmt.Errorf("encrypt: %w", err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		return "", fmt.Errorf("encrypt: %w", err)
	}
	if err := w.Close(); err != nil {
		return "", fmt.Errorf("encrypt: %w", err)
	}
	return Prefix + base64.StdEncoding.EncodeToString(out.Bytes()), nil
}

// Decrypt reads what Encrypt wrote, with the private key in PEM form. Text without
// the prefix comes back as it is: a secret need not be one.
func Decrypt(text string, private []byte) (string, error) {
	if !Is(text) {
		return text, nil
	}
	sealed, err := base64.StdEncoding.DecodeString(text[len(Prefix):])
	if err != nil {
		return "", errors.New("a secret that is not whole: bad base64")
	}
	id, err := agessh.ParseIdentity(private)
	if err != nil {
		return "", fmt.Errorf("private key: %w", err)
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), id)
	if err != nil {
		return "", fmt.Errorf("decrypt: %w", err)
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxText))
	if err != nil {
		return "", fmt.Errorf("decrypt: %w", err)
	}
	return string(plain), nil
}

// Push is what a registry's password is for: user pushes to registry.
func Push(user, registry string) string { return "push " + user + "@" + registry }

// Bind says what a secret is for, before it is encrypted: raid reveals such a one for
// nothing else, so that a copy of it is of no use to anybody else.
func Bind(text, purpose string) string { return purpose + "\n" + text }

// Unbind returns the text that Bind got, if it was for that purpose.
func Unbind(bound, purpose string) (string, error) {
	text, ok := strings.CutPrefix(bound, purpose+"\n")
	if !ok {
		return "", errors.New("a secret that is for something else")
	}
	return text, nil
}
