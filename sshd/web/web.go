// Package web serves what raid gives by HTTP: files to whoever has a link, and whether
// raid is well.
//
//	s := web.New(web.Config{…})
//	url := s.Link(key, "job-17.tar", time.Now().Add(15*time.Minute))
//	err := s.Serve(ctx, listener, grace)
//
// There is nothing else: no index, no names to guess, nobody to log in as. A link is a
// key, a file name and a time with a MAC over all of them and the method, made with a
// secret that every raid of a deployment derives from the host key; whoever can read a
// link can use it until then. It promises: a request without a good MAC opens no file and
// learns nothing of what there is, and slow or many clients cost a bounded number of
// connections and of open files. Non-goals: TLS, which is a proxy's business, and who may
// have a link.
package web

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/netutil"
)

const (
	connections = 512              // more wait to be accepted
	downloads   = 64               // more are told to come again
	slow        = 30 * time.Second // for a client to take the next piece
	piece       = 64 << 10
)

// A Config says what a server serves. All but Logf are required.
type Config struct {
	Secret []byte // of Secret
	Base   string // what links begin with, as clients see it: "https://raid.example.org"
	// Open opens what a key names. fs.ErrNotExist is told as gone, any other error as one
	// to try again.
	Open func(ctx context.Context, key string) (File, error)
	// Well returns why raid is not well.
	Well func(ctx context.Context) error
	Logf func(format string, args ...any)
}

// A File is closed by the server.
type File interface {
	io.ReadSeeker
	io.Closer
}

// A Server is an http.Handler, and runs one.
type Server struct {
	Config
	open chan struct{} // a token for each download
}

// New returns a server.
func New(c Config) *Server {
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	c.Base = strings.TrimRight(c.Base, "/")
	return &Server{Config: c, open: make(chan struct{}, downloads)}
}

// Secret derives the secret of links from the private host key, as it stands in its file.
func Secret(hostKey []byte) ([]byte, error) {
	return hkdf.Key(sha256.New, hostKey, nil, "raid links 1", sha256.Size)
}

const linkPath = "/file/"

// Link returns a URL that gives what key names, as a file called name, until expiry.
func (s *Server) Link(key, name string, expiry time.Time) string {
	until := strconv.FormatInt(expiry.Unix(), 10)
	return s.Base + linkPath + url.PathEscape(key) + "/" + url.PathEscape(name) + "?" +
		url.Values{"until": {until}, "mac": {s.mac(key, name, until)}}.Encode()
}

// mac covers everything that a link says. No part can run into the next: each comes with
// its length. GET stands for HEAD, too.
func (s *Server) mac(key, name, until string) string {
	m := hmac.New(sha256.New, s.Config.Secret)
	for _, part := range []string{http.MethodGet, key, name, until} {
		fmt.Fprintf(m, "%d:%s\n", len(part), part)
	}
	return base64.RawURLEncoding.EncodeToString(m.Sum(nil))
}

// check returns what a link is for, or what to answer instead.
func (s *Server) check(u *url.URL) (key, name string, status int) {
	parts := strings.Split(strings.TrimPrefix(u.EscapedPath(), linkPath), "/")
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil || len(parts) != 2 || len(q["until"]) != 1 || len(q["mac"]) != 1 {
		return "", "", http.StatusNotFound
	}
	key, err1 := url.PathUnescape(parts[0])
	name, err2 := url.PathUnescape(parts[1])
	if err := errors.Join(err1, err2); err != nil {
		return "", "", http.StatusNotFound
	}
	if !hmac.Equal([]byte(q.Get("mac")), []byte(s.mac(key, name, q.Get("until")))) {
		return "", "", http.StatusForbidden
	}
	until, err := strconv.ParseInt(q.Get("until"), 10, 64) // ours: the MAC says so
	if err != nil || time.Now().Unix() >= until {
		return "", "", http.StatusGone
	}
	return key, name, http.StatusOK
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "private, no-store")
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		h.Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
	case r.ContentLength != 0:
		h.Set("Connection", "close") // or it would be read to its end, however slowly that comes
		http.Error(w, "no content is wanted", http.StatusRequestEntityTooLarge)
	case r.URL.Path == "/healthz":
		s.health(w, r)
	case strings.HasPrefix(r.URL.EscapedPath(), linkPath):
		s.file(w, r)
	default:
		http.Error(w, "nothing here", http.StatusNotFound)
	}
}

func (s *Server) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := s.Well(ctx); err != nil {
		s.Logf("not well: %v", err)
		http.Error(w, "not well", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

// words are what people see who use an old link.
var words = map[int]string{
	http.StatusNotFound:  "nothing here",
	http.StatusForbidden: "not a link of this raid",
	http.StatusGone:      "this link has expired; ask for another",
}

func (s *Server) file(w http.ResponseWriter, r *http.Request) {
	key, name, status := s.check(r.URL)
	if status != http.StatusOK {
		http.Error(w, words[status], status)
		return
	}
	select {
	case s.open <- struct{}{}:
		defer func() { <-s.open }()
	default:
		w.Header().Set("Retry-After", "10")
		http.Error(w, "too many downloads; try again soon", http.StatusServiceUnavailable)
		return
	}
	f, err := s.Open(r.Context(), key)
	if err != nil {
		s.failed(w, key, err)
		return
	}
	defer f.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": name}))
	// The key is of what is in it: no two versions of a file have the same.
	h.Set("ETag", strconv.Quote(key))
	http.ServeContent(&paced{ResponseWriter: w, control: http.NewResponseController(w)}, r, "", time.Time{}, f)
}

// failed says that a file cannot be had.
func (s *Server) failed(w http.ResponseWriter, key string, err error) {
	if errors.Is(err, fs.ErrNotExist) {
		http.Error(w, "the file was removed", http.StatusGone)
		return
	}
	s.Logf("give %s: %v", key, err)
	w.Header().Set("Retry-After", "60")
	http.Error(w, "the file cannot be read at the moment", http.StatusServiceUnavailable)
}

// paced gives each piece its own time to be taken: one deadline for all would have to
// allow for the largest file on the slowest line.
type paced struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (p *paced) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		if err := p.control.SetWriteDeadline(time.Now().Add(slow)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return n, err
		}
		var m int
		m, err = p.ResponseWriter.Write(b[:min(len(b), piece)])
		n, b = n+m, b[m:]
	}
	return n, err
}

// Serve answers requests on l until ctx ends, and gives those under way grace to end. It
// returns nil after an orderly end. l is closed.
func (s *Server) Serve(ctx context.Context, l net.Listener, grace time.Duration) error {
	h := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: slow, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: log.New(logger(s.Logf), "", 0),
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }}
	served := make(chan error, 1)
	go func() { served <- h.Serve(netutil.LimitListener(l, connections)) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if err := h.Shutdown(limit); err != nil {
		h.Close()
	}
	<-served
	return nil
}

// logger is where net/http complains to.
type logger func(format string, args ...any)

func (l logger) Write(p []byte) (int, error) {
	l("http: %s", strings.TrimSpace(string(p)))
	return len(p), nil
}
