package web

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const text = "0123456789"

// A shelf has files, and counts how often it was asked.
type shelf struct {
	files map[string]string
	err   error
	asked atomic.Int64
	open  atomic.Int64
}

type book struct {
	io.ReadSeeker
	s *shelf
}

func (b *book) Close() error { b.s.open.Add(-1); return nil }

func (s *shelf) get(_ context.Context, key string) (File, error) {
	s.asked.Add(1)
	if s.err != nil {
		return nil, s.err
	}
	body, ok := s.files[key]
	if !ok {
		return nil, fmt.Errorf("%s: %w", key, fs.ErrNotExist)
	}
	s.open.Add(1)
	return &book{strings.NewReader(body), s}, nil
}

func server(t testing.TB, s *shelf) *Server {
	t.Helper()
	secret, err := Secret([]byte("host key"))
	if err != nil {
		t.Fatal(err)
	}
	return New(Config{Secret: secret, Base: "http://raid.example.org/", Open: s.get, Logf: t.Logf, Well: func(context.Context) error { return s.err }})
}

func ask(s http.Handler, method, link string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, link, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func TestLink(t *testing.T) {
	shelf := &shelf{files: map[string]string{"sha256:ab": text}}
	s := server(t, shelf)
	name := `job-1 "build" é.tar`
	link := s.Link("sha256:ab", name, time.Now().Add(time.Minute))
	if !strings.HasPrefix(link, "http://raid.example.org/file/sha256:ab/job-1%20") {
		t.Errorf("Link = %s", link)
	}
	for _, tt := range []struct {
		method string
		header []string
		status int
		body   string
	}{
		{"GET", nil, 200, text},
		{"HEAD", nil, 200, ""},
		{"GET", []string{"Range", "bytes=3-5"}, 206, "345"},
		{"GET", []string{"Range", "bytes=-2"}, 206, "89"},
		{"GET", []string{"Range", "bytes=10-"}, 416, "invalid range: failed to overlap\n"},
		{"GET", []string{"If-None-Match", `"sha256:ab"`}, 304, ""},
	} {
		w := ask(s, tt.method, link, tt.header...)
		if w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s %q = %d %q, want %d %q", tt.method, tt.header, w.Code, w.Body, tt.status, tt.body)
		}
	}
	h := ask(s, "GET", link).Header()
	if got := h.Get("Content-Disposition"); got != `attachment; filename*=utf-8''job-1%20%22build%22%20%C3%A9.tar` {
		t.Errorf("Content-Disposition = %s", got)
	}
	if h.Get("Content-Type") != "application/octet-stream" || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("a browser could take it for a page: %v", h)
	}
	if shelf.open.Load() != 0 {
		t.Errorf("%d files are still open", shelf.open.Load())
	}
}

// Whatever is changed in a link, no file is even looked for.
func TestForged(t *testing.T) {
	shelf := &shelf{files: map[string]string{"sha256:ab": text, "sha256:cd": "secret"}}
	s := server(t, shelf)
	until := time.Now().Add(time.Minute)
	link := s.Link("sha256:ab", "a.tar", until)
	other, err := Secret([]byte("another host key"))
	if err != nil {
		t.Fatal(err)
	}
	forger := New(Config{Secret: other, Base: s.Base})
	q := strings.Index(link, "?")
	for what, try := range map[string]string{
		"another file":     strings.Replace(link, "sha256:ab", "sha256:cd", 1),
		"another name":     strings.Replace(link, "a.tar", "b.tar", 1),
		"longer":           strings.Replace(link, strconv.FormatInt(until.Unix(), 10), strconv.FormatInt(until.Unix()+1, 10), 1),
		"part of the MAC":  link[:strings.Index(link, "mac=")+10] + link[strings.Index(link, "&until"):],
		"no MAC":           link[:q] + "?until=" + strconv.FormatInt(until.Unix(), 10),
		"an empty MAC":     link[:q] + "?mac=&until=" + strconv.FormatInt(until.Unix(), 10),
		"no query":         link[:q],
		"two MACs":         link + "&mac=x",
		"another key":      forger.Link("sha256:ab", "a.tar", until),
		"a longer path":    strings.Replace(link, "a.tar", "a.tar/b", 1),
		"a shorter path":   strings.Replace(link, "/a.tar", "", 1),
		"parts that slide": strings.Replace(link, "sha256:ab/a.tar", "sha256:aba/.tar", 1),
		"dots":             strings.Replace(link, "sha256:ab", "..", 1),
		"the folder":       "http://x/file/",
		"the root":         "http://x/",
		"elsewhere":        "http://x/etc/passwd",
	} {
		if w := ask(s, "GET", try); w.Code != 403 && w.Code != 404 || strings.Contains(w.Body.String(), text) {
			t.Errorf("%s: %s = %d %q", what, try, w.Code, w.Body)
		}
	}
	body := httptest.NewRequest("GET", link, strings.NewReader("body"))
	w := httptest.NewRecorder()
	if s.ServeHTTP(w, body); w.Code != 413 || w.Header().Get("Connection") != "close" {
		t.Errorf("GET with a body = %d, want 413 and the end", w.Code)
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"} {
		if w := ask(s, method, link); w.Code != 405 {
			t.Errorf("%s = %d, want 405", method, w.Code)
		}
	}
	if n := shelf.asked.Load(); n != 0 {
		t.Errorf("a file was looked for %d times", n)
	}
}

// A link works until its time, to the second, and not a second longer.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := server(t, &shelf{files: map[string]string{"k": text}})
		link := s.Link("k", "a", time.Now().Add(15*time.Minute))
		time.Sleep(15*time.Minute - time.Nanosecond)
		if w := ask(s, "GET", link); w.Code != 200 {
			t.Errorf("just before its end = %d", w.Code)
		}
		time.Sleep(time.Nanosecond)
		if w := ask(s, "GET", link); w.Code != 410 || !strings.Contains(w.Body.String(), "expired") {
			t.Errorf("at its end = %d %q, want 410", w.Code, w.Body)
		}
	})
}

func TestGone(t *testing.T) {
	shelf := &shelf{}
	s := server(t, shelf)
	link := s.Link("k", "a", time.Now().Add(time.Minute))
	if w := ask(s, "GET", link); w.Code != 410 {
		t.Errorf("a file that was removed = %d, want 410", w.Code)
	}
	if w := ask(s, "GET", "/healthz"); w.Code != 200 || w.Body.String() != "ok\n" {
		t.Errorf("/healthz = %d %q", w.Code, w.Body)
	}
	shelf.err = errors.New("disk on fire at /var/lib")
	for _, path := range []string{link, "/healthz"} {
		if w := ask(s, "GET", path); w.Code != 503 || strings.Contains(w.Body.String(), "/var") {
			t.Errorf("%s with an error = %d %q, want 503 without why", path, w.Code, w.Body)
		}
	}
}

// More downloads than there may be are told so; a client that takes nothing loses its
// place in time, over a real connection.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := &shelf{files: map[string]string{"k": strings.Repeat("x", 1<<20)}}
		s := server(t, shelf)
		ctx, stop := context.WithCancel(t.Context())
		l := &pipes{ch: make(chan net.Conn), done: make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, l, time.Second) }()
		path, _ := url.Parse(s.Link("k", "a", time.Now().Add(time.Hour)))
		var clients []net.Conn
		for range downloads {
			c := l.dial()
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path.RequestURI())
			clients = append(clients, c)
		}
		synctest.Wait()
		if n := shelf.open.Load(); n != downloads {
			t.Errorf("%d files are open, want %d", n, downloads)
		}
		if w := ask(s, "GET", path.String()); w.Code != 503 || w.Header().Get("Retry-After") == "" {
			t.Errorf("one more = %d, want 503", w.Code)
		}
		time.Sleep(slow + time.Second)
		synctest.Wait()
		if n := shelf.open.Load(); n != 0 {
			t.Errorf("after %v %d clients who take nothing still have files open", slow, n)
		}
		quiet := l.dial() // says nothing at all
		time.Sleep(11 * time.Second)
		if _, err := quiet.Read(make([]byte, 1)); err == nil {
			t.Error("a client who says nothing is not cut off")
		}
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		for _, c := range append(clients, quiet) {
			c.Close()
		}
	})
}

// A client that is slow and steady gets everything, however long it takes.
func TestSteady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := strings.Repeat("0123456789abcdef", 1<<16)
		s := server(t, &shelf{files: map[string]string{"k": want}})
		ctx, stop := context.WithCancel(t.Context())
		l := &pipes{ch: make(chan net.Conn), done: make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, l, time.Second) }()
		path, _ := url.Parse(s.Link("k", "a", time.Now().Add(time.Hour)))
		c := l.dial()
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path.RequestURI())
		var got bytes.Buffer
		for {
			_, err := io.CopyN(&got, c, 50_000)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("after %d bytes: %v", got.Len(), err)
			}
			time.Sleep(slow / 2)
		}
		if !strings.HasSuffix(got.String(), want) {
			t.Errorf("got %d bytes, or others, want %d", got.Len(), len(want))
		}
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		c.Close()
	})
}

// pipes is a listener within a test's own time.
type pipes struct {
	ch   chan net.Conn
	done chan struct{}
}

func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.ch <- theirs
	return ours
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.ch:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	close(p.done)
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func FuzzCheck(f *testing.F) {
	s := server(f, &shelf{})
	good, _ := url.Parse(s.Link("k", "a", time.Now().Add(time.Hour)))
	f.Add(good.RequestURI())
	f.Add("/file/%2e%2e/a?until=9&mac=x")
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := url.ParseRequestURI(uri)
		if err != nil {
			return
		}
		key, name, status := s.check(u)
		if status == http.StatusOK && (key != "k" || name != "a") {
			t.Errorf("check(%q) = %q, %q", uri, key, name)
		}
	})
}
