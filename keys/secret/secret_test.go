package secret

import (
	"strings"
	"testing"

	"github.com/rai-project/raid/keys"
)

func pair(t *testing.T) (private []byte, public string) {
	t.Helper()
	private, public, err := keys.NewKey("test")
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

func TestRoundTrip(t *testing.T) {
	private, public := pair(t)
	for _, text := range []string{"", "hunter2", "redis://:p%40ss@10.0.0.1:6379/1", strings.Repeat("x", maxText)} {
		sealed, err := Encrypt(text, public)
		if err != nil {
			t.Fatal(err)
		}
		if !Is(sealed) || strings.ContainsAny(sealed, "\n \"") || len(text) > 4 && strings.Contains(sealed, text) {
			t.Errorf("Encrypt(%.20q) = %.40q, want one opaque word", text, sealed)
		}
		got, err := Decrypt(sealed, private)
		if err != nil || got != text {
			t.Errorf("Decrypt(Encrypt(%.20q)) = %.20q, %v", text, got, err)
		}
	}
}

func TestRefuses(t *testing.T) {
	private, public := pair(t)
	other, _ := pair(t)
	sealed, err := Encrypt("hunter2", public)
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(sealed)
	flipped[len(flipped)-8] ^= 1
	for name, tt := range map[string]struct {
		text    string
		private []byte
	}{
		"another key":  {sealed, other},
		"one bit":      {string(flipped), private},
		"cut":          {sealed[:len(sealed)-12], private},
		"not base64":   {"age:***", private},
		"no key":       {sealed, nil},
		"only the tag": {Prefix, private},
	} {
		if got, err := Decrypt(tt.text, tt.private); err == nil {
			t.Errorf("%s: Decrypt = %q, want an error", name, got)
		}
	}
	if got, err := Decrypt("plain", nil); got != "plain" || err != nil {
		t.Errorf("Decrypt(plain) = %q, %v; want it as it is", got, err)
	}
	if _, err := Encrypt("x", "ssh-ed25519 nonsense"); err == nil {
		t.Error("Encrypt to a broken key: want an error")
	}
}

func FuzzDecrypt(f *testing.F) {
	private, public, err := keys.NewKey("fuzz")
	if err != nil {
		f.Fatal(err)
	}
	sealed, err := Encrypt("x", public)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := Decrypt(text, private); err == nil && Is(text) && text != sealed && got != "x" {
			t.Errorf("Decrypt(%q) = %q, want an error", text, got)
		}
	})
}

// What was made for one purpose is revealed for no other.
func TestBind(t *testing.T) {
	bound := Bind("hunter2", Push("ada", "docker.io"))
	if got, err := Unbind(bound, Push("ada", "docker.io")); got != "hunter2" || err != nil {
		t.Errorf("Unbind = %q, %v", got, err)
	}
	for _, other := range []string{Push("bob", "docker.io"), Push("ada", "docker.io.evil.com"), Push("ada", ""), ""} {
		if got, err := Unbind(bound, other); err == nil {
			t.Errorf("Unbind for %q = %q, want an error", other, got)
		}
	}
	if got, err := Unbind("hunter2", Push("ada", "docker.io")); err == nil {
		t.Errorf("Unbind of what was never bound = %q, want an error", got)
	}
}
