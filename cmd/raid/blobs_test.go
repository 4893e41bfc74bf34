package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/sshd/blob"
)

func TestBlobsConfig(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"[blobs]\nurl = \"file:///srv/raid\"", ""},
		{"[blobs]\nurl = \"s3://bucket/prefix?endpoint=http://127.0.0.1:9000&style=path\"\nkey = \"a\"\nsecret = \"b/c+d\"", ""},
		{"[blobs]\nurl = \"age:abc\"\nkey = \"age:abc\"\nsecret = \"age:def\"", ""},
		{"[http]\nlisten = \":8080\"\nurl = \"https://raid.example.org\"", ""},
		{"[blobs]\nurl = \"/srv/raid\"", "file:///path or s3://bucket"},
		{"[blobs]\nurl = \"file://srv/raid\"", "file:///path or s3://bucket"},
		{"[blobs]\nurl = \"https://KEY:hush@bucket\"", "file:///path or s3://bucket"},
		{"[blobs]\nurl = \"s3://KEY:hush@bucket?stile=path\"", "stile"},
		{"[blobs]\nurl = \"s3://KEY:hu/sh@bucket\"", "looks like"},
		{"[blobs]\nurl = \"s3://bucket\"\nkey = \"a\"", "go together"},
		{"[http]\nurl = \"https://raid.example.org\"", "needs [http] listen"},
		{"[http]\nlisten = \":8080\"\nurl = \"raid.example.org\"", "looks like https"},
	} {
		_, err := readText(t, tt.text)
		if got := fmt.Sprint(err); (err == nil) != (tt.want == "") || !strings.Contains(got, tt.want) || strings.Contains(got, "hush") {
			t.Errorf("%s\n= %v, want %q", tt.text, err, tt.want)
		}
	}
}

// Key and secret may stand in the URL or beside it, in the clear or not, and only the host
// key opens what is not.
func TestBlobsSecrets(t *testing.T) {
	dir := t.TempDir()
	hostKey := filepath.Join(dir, "host_key")
	public, err := ensureKey(hostKey, "host")
	if err != nil {
		t.Fatal(err)
	}
	seal := func(text string) string {
		t.Helper()
		s, err := secret.Encrypt(text, public)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	const want = "s3://KEY:se%2Fcret@bucket/a?style=path"
	for _, b := range []blobsConfig{
		{URL: want},
		{URL: seal(want)},
		{URL: "s3://bucket/a?style=path", Key: "KEY", Secret: seal("se/cret")},
		{URL: seal("s3://bucket/a?style=path"), Key: seal("KEY"), Secret: "se/cret"},
	} {
		if err := b.reveal(hostKey); err != nil || b.withKey() != want {
			t.Errorf("reveal = %v, and the URL is %q, want %q", err, b.withKey(), want)
		}
	}
	other := filepath.Join(dir, "other")
	if _, err := ensureKey(other, "other"); err != nil {
		t.Fatal(err)
	}
	b := blobsConfig{URL: seal(want)}
	if err := b.reveal(other); err == nil {
		t.Error("another key opens the secret")
	}
	// What was hidden is checked once it is seen.
	if b := (blobsConfig{URL: seal("ftp://KEY:hush@x")}); true {
		if err := b.reveal(hostKey); err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("reveal of a bad URL = %v, want an error without it", err)
		}
	}
}

func TestLinkBase(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ url, addr, want string }{
		{"", "127.0.0.1:8080", "http://127.0.0.1:8080"},
		{"", "[::1]:8080", "http://[::1]:8080"},
		{"", "[::]:8080", "http://" + name + ":8080"},
		{"https://raid.example.org/x", "[::]:8080", "https://raid.example.org/x"},
	} {
		addr, err := net.ResolveTCPAddr("tcp", tt.addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := (&httpConfig{URL: tt.url}).base(addr); got != tt.want {
			t.Errorf("base(%q) with url %q = %q, want %q", tt.addr, tt.url, got, tt.want)
		}
	}
}

func TestJudgeBucket(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want level
		fix  string
	}{
		{nil, fine, ""}, {fmt.Errorf("%w: it is them", blob.ErrForeign), broken, "a prefix of its own"},
		{fmt.Errorf("%w: refused", blob.ErrUnavailable), broken, "results wait"}, {fmt.Errorf("%w: no bucket", blob.ErrDenied), broken, ""},
		{errors.New("else"), broken, ""},
	} {
		if f := judgeBucket("bucket at host", tt.err); f.Level != tt.want || !strings.Contains(f.Fix, tt.fix) {
			t.Errorf("judgeBucket(%v) = %+v, want %s, %q", tt.err, f, tt.want, tt.fix)
		}
	}
}
