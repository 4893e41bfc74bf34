package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/web"
)

type httpConfig struct {
	Listen string `toml:"listen"` // "" for none
	URL    string `toml:"url"`    // what links begin with, if a proxy is before us
}

// check says what is wrong with where blobs are to be, before anything is opened.
func (b *blobsConfig) check() error {
	if b.Key != "" && b.Secret == "" || b.Key == "" && b.Secret != "" {
		return errors.New("[blobs] key and secret go together")
	}
	scheme, path, _ := strings.Cut(b.URL, "://")
	switch {
	case b.URL == "", secret.Is(b.URL), scheme == "file" && filepath.IsAbs(path):
		return nil
	case scheme == "s3":
		if err := blob.CheckURL(b.URL); err != nil {
			return fmt.Errorf("[blobs] url: %w", err)
		}
		return nil
	}
	return errors.New("[blobs] url is file:///path or s3://bucket?endpoint=…") // what it is may be secret
}

// reveal decrypts what may be a secret, with the host key.
func (b *blobsConfig) reveal(hostKey string) (err error) {
	for name, text := range map[string]*string{"url": &b.URL, "key": &b.Key, "secret": &b.Secret} {
		if *text, err = decrypt(*text, hostKey); err != nil {
			return fmt.Errorf("[blobs] %s: %w", name, err)
		}
	}
	return b.check() // now that it can be read
}

// open returns how to open the blobs of a state folder. alone says that no other raid
// serves the same deployment.
func (b *blobsConfig) open(state string, alone bool, owner ssh.PublicKey, logger *log.Logger) func(blob.Options) (blob.Store, error) {
	return func(o blob.Options) (blob.Store, error) {
		if path, ok := strings.CutPrefix(b.URL, "file://"); ok {
			return folder(path, o)
		}
		if b.URL == "" {
			return folder(filepath.Join(state, "blobs"), o)
		}
		s, err := b.bucket(filepath.Join(state, "blobs"), o, alone, owner)
		if err != nil {
			return nil, fmt.Errorf("[blobs] url: %w", err)
		}
		return s, claim(s, logger)
	}
}

// folder opens a folder, and is no *blob.Folder that is nil after an error.
func folder(dir string, o blob.Options) (blob.Store, error) {
	f, err := blob.Open(dir, o)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (b *blobsConfig) bucket(dir string, o blob.Options, alone bool, owner ssh.PublicKey) (*blob.Bucket, error) {
	return blob.OpenBucket(dir, blob.BucketOptions{Options: o, URL: b.withKey(), Owner: ownerName(owner), Alone: alone})
}

// withKey returns the URL with key and secret in it.
func (b *blobsConfig) withKey() string {
	u, err := url.Parse(b.URL)
	if err != nil || b.Key == "" {
		return b.URL
	}
	u.User = url.UserPassword(b.Key, b.Secret)
	return u.String()
}

// ownerName names a deployment: all its raids have the same host key.
func ownerName(host ssh.PublicKey) string {
	sum := sha256.Sum256(append([]byte("raid blobs "), host.Marshal()...))
	return "raid " + hex.EncodeToString(sum[:8])
}

// claim keeps raid from starting on a bucket of somebody else's. A store that is away, or
// does not let us in, is none of a start's business: jobs that run want their raid back.
func claim(s *blob.Bucket, logger *log.Logger) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := s.Claim(ctx)
	if errors.Is(err, blob.ErrForeign) {
		return cli.Hintf(err, "give each deployment a bucket or a prefix of its own: s3://bucket/prefix; if the host key was replaced, remove raid-owner there")
	}
	if err != nil {
		logger.Error("the bucket cannot be used", "err", err)
	}
	return nil
}

// linkSecret is what links are made with.
func linkSecret(hostKey string) ([]byte, error) {
	text, err := os.ReadFile(hostKey)
	if err != nil {
		return nil, err
	}
	return web.Secret(text)
}

func (h *httpConfig) check() error {
	if h.Listen == "" && h.URL != "" {
		return errors.New("[http] url needs [http] listen")
	}
	u, err := url.Parse(h.URL)
	if h.URL != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return fmt.Errorf("[http] url = %q: it looks like https://raid.example.org", h.URL)
	}
	return nil
}

// open listens, and returns what sshd has to know of it; nil for neither.
func (h *httpConfig) open(ctx context.Context, hostKey string) (net.Listener, *sshd.HTTP, error) {
	if h.Listen == "" {
		return nil, nil, nil
	}
	key, err := linkSecret(hostKey)
	if err != nil {
		return nil, nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", h.Listen)
	if err != nil {
		return nil, nil, cli.Hintf(err, "choose another address in [http] listen")
	}
	return l, &sshd.HTTP{Secret: key, Base: h.base(l.Addr())}, nil
}

// base is what links begin with. Whoever listens on all addresses knows none of them that
// others would reach, but a name.
func (h *httpConfig) base(addr net.Addr) string {
	if h.URL != "" {
		return h.URL
	}
	host, port, err := net.SplitHostPort(addr.String())
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	return "http://" + net.JoinHostPort(host, port)
}

func reportHTTP(err error, logger *log.Logger) {
	if err != nil {
		logger.Error("HTTP has stopped; all else goes on", "err", err)
	}
}

// examineBlobs looks at where uploads and outputs are to be.
func examineBlobs(ctx context.Context, p *patient) []finding {
	const what = "blobs"
	b := p.c.Blobs
	hostKey := filepath.Join(p.state, "host_key")
	if err := b.reveal(hostKey); err != nil {
		return []finding{bad(what, "rai-crypto encrypt -r "+hostKey+".pub", "%v", err)}
	}
	if path, ok := strings.CutPrefix(b.URL, "file://"); ok {
		return []finding{good(what, "in the folder %s", path)}
	}
	if b.URL == "" {
		return []finding{good(what, "in the state folder")}
	}
	o := blob.BucketOptions{URL: b.withKey()}
	if host, err := keys.LoadSigner(hostKey, nil); err == nil {
		o.Owner = ownerName(host.PublicKey())
	}
	where, err := blob.ExamineBucket(ctx, o)
	return []finding{judgeBucket(where, err)}
}

func judgeBucket(where string, err error) finding {
	const what = "blobs"
	switch {
	case err == nil:
		return good(what, "%s answers", where)
	case errors.Is(err, blob.ErrForeign):
		return bad(what, "give each deployment a bucket or a prefix of its own: s3://bucket/prefix", "%v", err)
	case errors.Is(err, blob.ErrUnavailable):
		return bad(what, "see that "+where+" is up; until then submits are refused and results wait", "%v", err)
	}
	return bad(what, "", "%v", err)
}
