package blob_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/blob/blobtest"
)

// newBucket makes an empty bucket and returns its URL and name.
func newBucket(t testing.TB, s *blobtest.Server) (url, name string) {
	t.Helper()
	name, err := s.NewBucket(t.Context())
	if err != nil {
		t.Fatalf("make a bucket: %v", err)
	}
	return s.URL(name), name
}

func openBucket(t testing.TB, dir string, o blob.BucketOptions) *blob.Bucket {
	t.Helper()
	b, err := blob.OpenBucket(dir, o)
	if err != nil {
		t.Fatalf("OpenBucket = %v", err)
	}
	return b
}

func client(t testing.TB, s *blobtest.Server) *minio.Client {
	t.Helper()
	c, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// objects returns the names of all that is in a bucket, with uploads that did not end.
func objects(t testing.TB, c *minio.Client, bucket string) (names []string) {
	t.Helper()
	for o := range c.ListObjectsIter(t.Context(), bucket, minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		names = append(names, o.Key)
	}
	for u := range c.ListIncompleteUploads(context.WithoutCancel(t.Context()), bucket, "", true) {
		if u.Err != nil {
			t.Fatal(u.Err)
		}
		names = append(names, "half "+u.Key)
	}
	return names
}

func TestBucket(t *testing.T) {
	s := blobtest.StartServer(t)
	c := client(t, s)
	blobtest.Run(t, func(t testing.TB) blobtest.Place {
		dir := filepath.Join(t.TempDir(), "blobs")
		url, name := newBucket(t, s)
		url = strings.Replace(url, name, name+"/a/part", 1)
		return blobtest.Place{Dir: dir,
			Open: func(t testing.TB, o blob.Options) blob.Store {
				return openBucket(t, dir, blob.BucketOptions{Options: o, URL: url})
			},
			Tamper: func(t testing.TB, k blob.Key, text string) {
				t.Helper()
				_, err := c.PutObject(t.Context(), name, "a/part/sha256/"+k.Hex()[:2]+"/"+k.Hex()[2:], strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{})
				if err != nil {
					t.Fatal(err)
				}
			},
			Count: func(t testing.TB) int { return len(objects(t, c, name)) },
		}
	})
}

// TestBucketAgain: a blob that is there is not sent again, and a large one is never in
// memory.
func TestBucketAgain(t *testing.T) {
	s := blobtest.StartServer(t)
	url, name := newBucket(t, s)
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url})
	const size = 100 << 20 // several parts
	push := func() (k blob.Key, sent, held int64) {
		t.Helper()
		u := create(t, b, 0)
		if _, err := io.CopyN(u, repeat("0123456789"), size); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		sent = s.Received()
		k, err := u.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return k, s.Received() - sent, int64(after.TotalAlloc - before.TotalAlloc)
	}
	k, sent, held := push()
	if sent < size || held > size/4 {
		t.Errorf("of %d MiB %d were sent, and %d were allocated for it", size>>20, sent>>20, held>>20)
	}
	if _, sent, _ := push(); sent > 64<<10 {
		t.Errorf("of what was there already %d bytes were sent again", sent)
	}
	if all := objects(t, client(t, s), name); len(all) != 1 {
		t.Errorf("objects = %q, want one", all)
	}
	if err := b.Verify(t.Context(), k); err != nil {
		t.Error(err)
	}
}

// TestBucketTidy: uploads that nobody will end go, those of a process that we do not know
// of after a day only, and nothing is done in somebody else's bucket.
func TestBucketTidy(t *testing.T) {
	s := blobtest.StartServer(t)
	c := client(t, s)
	url, name := newBucket(t, s)
	half := "sha256/ab/" + strings.Repeat("c", 62)
	if _, err := (minio.Core{Client: c}).NewMultipartUpload(t.Context(), name, half, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		owner string
		alone bool
		err   error
		half  int
	}{{"us", false, nil, 1}, {"them", true, blob.ErrForeign, 1}, {"us", true, nil, 0}} {
		b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url, Owner: tt.owner, Alone: tt.alone})
		for range 2 {
			if err := b.Tidy(t.Context()); !errors.Is(err, tt.err) {
				t.Errorf("Tidy as %s = %v, want %v", tt.owner, err, tt.err)
			}
		}
		if all := objects(t, c, name); len(all) != 1+tt.half {
			t.Errorf("as %s, alone %v: objects = %q, want %d halves", tt.owner, tt.alone, all, tt.half)
		}
	}
	// Once we have begun, an upload may be our own.
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url, Owner: "us", Alone: true})
	if err := b.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := (minio.Core{Client: c}).NewMultipartUpload(t.Context(), name, half, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := b.Tidy(t.Context()); err != nil || len(objects(t, c, name)) != 2 {
		t.Errorf("a later Tidy = %v, objects = %q, want the new half kept", err, objects(t, c, name))
	}
}

// TestBucketDown: a store that refuses, hangs or breaks off costs a bounded time and is
// told apart from one that has no such blob; when it is back, all goes on.
func TestBucketDown(t *testing.T) {
	s := blobtest.StartServer(t)
	url, name := newBucket(t, s)
	patient := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url})
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url, Stall: time.Second})
	k := put(t, patient, strings.Repeat("here", 10<<20))
	for what, fail := range map[string]func(){"refuses": s.Refuse, "hangs": s.Hang} {
		reading, err := b.Open(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, reading, 1<<20); err != nil {
			t.Fatal(err)
		}
		fail()
		start := time.Now()
		var wg sync.WaitGroup
		for op, do := range map[string]func() error{
			"Stat":  func() error { _, err := b.Stat(t.Context(), k); return err },
			"Open":  func() error { _, err := b.Open(t.Context(), k); return err },
			"Read":  func() error { _, err := io.Copy(io.Discard, reading); return err },
			"Renew": func() error { return b.Renew(t.Context(), k) },
			"Tidy":  func() error { return b.Tidy(t.Context()) },
			"List": func() (err error) {
				for _, err = range b.List(t.Context()) {
				}
				return err
			},
			"Commit": func() error {
				u := create(t, b, 0)
				io.WriteString(u, "new")
				_, err := u.Commit(t.Context())
				return err
			},
		} {
			wg.Go(func() {
				if err := do(); !errors.Is(err, blob.ErrUnavailable) {
					t.Errorf("%s: %s = %v, want ErrUnavailable", what, op, err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d > 60*time.Second {
			t.Errorf("%s: it took %v to find out", what, d)
		}
		reading.Close()
		s.Work()
		put(t, patient, "new")
		if err := patient.Verify(t.Context(), k); err != nil {
			t.Errorf("after it %s: %v", what, err)
		}
	}
	if all := objects(t, client(t, s), name); len(all) != 2 {
		t.Errorf("objects = %q, want two", all)
	}
}

// TestBucketCut: a connection that breaks while a blob is read is made anew.
func TestBucketCut(t *testing.T) {
	s := blobtest.StartServer(t)
	url, _ := newBucket(t, s)
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url})
	text := strings.Repeat("0123456789abcdef", 2<<20)
	f, err := b.Open(t.Context(), put(t, b, text))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 3 {
		if _, err := io.CopyN(io.Discard, f, 5<<20); err != nil {
			t.Fatal(err)
		}
		s.Refuse()
		s.Work()
	}
	if rest, err := io.ReadAll(f); err != nil || len(rest) != len(text)-15<<20 {
		t.Errorf("after three cuts %d bytes are left, %v, want %d", len(rest), err, len(text)-15<<20)
	}
}

// TestBucketDenied: what only staff can mend says so.
func TestBucketDenied(t *testing.T) {
	s := blobtest.StartServer(t)
	right, name := newBucket(t, s)
	for what, url := range map[string]string{
		"the credentials are wrong": strings.Replace(right, "all@", "ALL@", 1),
		"there is no bucket absent": strings.Replace(right, "@"+name, "@absent", 1),
	} {
		b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: url, Owner: "us"})
		if err := b.Tidy(t.Context()); !errors.Is(err, blob.ErrDenied) || !strings.Contains(err.Error(), what) || strings.Contains(err.Error(), "secret") {
			t.Errorf("Tidy = %v, want that %s", err, what)
		}
		u := create(t, b, 0)
		if _, err := u.Commit(t.Context()); !errors.Is(err, blob.ErrDenied) {
			t.Errorf("Commit = %v, want that %s", err, what)
		}
	}
}

// TestBucketAnswers: answers that a good server gives only on a bad day.
func TestBucketAnswers(t *testing.T) {
	for _, tt := range []struct {
		status int
		code   string
		want   error
	}{{503, "SlowDown", blob.ErrUnavailable}, {500, "InternalError", blob.ErrUnavailable}, {507, "InsufficientStorage", blob.ErrNoSpace},
		{507, "XMinioStorageFull", blob.ErrNoSpace}, {403, "QuotaExceeded", blob.ErrDenied}, {403, "RequestTimeTooSkewed", blob.ErrDenied}, {404, "NoSuchKey", blob.ErrNotFound}} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			w.WriteHeader(tt.status)
			fmt.Fprintf(w, "<Error><Code>%s</Code><Message>no</Message></Error>", tt.code)
		}))
		b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: "s3://KEY:SECRET@bucket?style=path&endpoint=" + url.QueryEscape(srv.URL)})
		u := create(t, b, 0)
		if _, err := u.Commit(t.Context()); !errors.Is(err, tt.want) {
			t.Errorf("Commit when told %d %s = %v, want %v", tt.status, tt.code, err, tt.want)
		}
		srv.Close()
	}
}

// TestBucketTLS: a certificate that nobody vouches for is refused, and ca is believed.
func TestBucketTLS(t *testing.T) {
	s := blobtest.StartServer(t)
	plain, _ := newBucket(t, s)
	proxy := httptest.NewUnstartedServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = "http", s.Addr // Host stays: it is signed
	}})
	proxy.StartTLS()
	defer proxy.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: proxy.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	secure := strings.Replace(plain, url.QueryEscape("http://"+s.Addr), url.QueryEscape(proxy.URL), 1)
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: secure})
	if _, err := b.Stat(t.Context(), blobtest.KeyOf("x")); !errors.Is(err, blob.ErrUnavailable) || !errors.As(err, new(*tls.CertificateVerificationError)) {
		t.Errorf("Stat with an unknown certificate = %v, want that it is refused", err)
	}
	b = openBucket(t, t.TempDir(), blob.BucketOptions{URL: secure + "&ca=" + url.QueryEscape(ca)})
	if err := b.Verify(t.Context(), put(t, b, strings.Repeat("secret", 4<<20))); err != nil {
		t.Errorf("Verify over TLS = %v", err)
	}
}

// TestBucketLink: a link gives one blob to anybody, whole or in parts, for a while, and
// nothing else.
func TestBucketLink(t *testing.T) {
	s := blobtest.StartServer(t)
	at, _ := newBucket(t, s)
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: at})
	k, other := put(t, b, "0123456789"), put(t, b, "other")
	link, err := b.Link(t.Context(), k, "job-1.tar", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(method, link, bytes string) (int, string, http.Header) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, link, nil)
		if err != nil {
			t.Fatal(err)
		}
		if bytes != "" {
			req.Header.Set("Range", bytes)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body), res.Header
	}
	code, body, header := ask("GET", link, "")
	if code != 200 || body != "0123456789" || header.Get("Content-Disposition") != `attachment; filename="job-1.tar"` {
		t.Errorf("GET = %d %q, %q", code, body, header.Get("Content-Disposition"))
	}
	if code, body, _ := ask("GET", link, "bytes=3-5"); code != 206 || body != "345" {
		t.Errorf("GET of a part = %d %q", code, body)
	}
	for what, try := range map[string][2]string{
		"another blob":  {"GET", strings.Replace(link, k.Hex()[2:], other.Hex()[2:], 1)},
		"longer":        {"GET", strings.Replace(link, "X-Amz-Expires=3600", "X-Amz-Expires=36000", 1)},
		"another name":  {"GET", strings.Replace(link, "job-1", "job-2", 1)},
		"removing it":   {"DELETE", link},
		"replacing it":  {"PUT", link},
		"no signature":  {"GET", link[:strings.Index(link, "?")]},
		"bad signature": {"GET", link[:len(link)-1]},
	} {
		if try[1] == link && try[0] == "GET" {
			t.Fatalf("%s: nothing was changed in %s", what, link)
		}
		if code, _, _ := ask(try[0], try[1], ""); code/100 != 4 {
			t.Errorf("%s = %d, want it refused", what, code)
		}
	}
	if _, err := b.Link(t.Context(), blobtest.KeyOf("absent"), "x", time.Now().Add(time.Hour)); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("a link to nothing = %v, want ErrNotFound", err)
	}
	short, err := b.Link(t.Context(), k, "job-1.tar", time.Now().Add(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; { // its end is the server's to see
		if code, _, _ := ask("GET", short, ""); code == 403 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a link of a second still works after 30")
		}
	}
}

// TestBucketURL: what is wrong with a URL is said, without what is secret in it.
func TestBucketURL(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	for _, tt := range []struct{ url, want string }{
		{"s3://bucket", ""},
		{"s3://bucket/some/prefix/?region=eu-west-1", ""},
		{"s3://KEY:sec%2Fret@bucket?endpoint=minio.lan:9000&style=path&public=https://s3.example.org", ""},
		{"s3://KEY:sec%2Fret@bucket?endpoint=http://127.0.0.1:9000&style=virtual", ""},
		{"", "looks like"}, {"s3://", "looks like"}, {"s3:bucket", "looks like"}, {"https://bucket", "looks like"}, {"s3://KEY:sec/ret@bucket", "looks like"},
		{"s3://KEY:sec%ret@bucket", "looks like"}, {"s3://bucket:9000", "looks like"}, {"s3://KEY@bucket", "both"}, {"s3://:secret@bucket", "both"},
		{"s3://bucket?endpiont=x", "endpiont"}, {"s3://bucket?style=dns", "path or virtual"}, {"s3://bucket?endpoint=ftp://x", "an endpoint"},
		{"s3://bucket?endpoint=http://x/y", "an endpoint"}, {"s3://bucket?ca=/absent", "ca"},
	} {
		_, err := blob.OpenBucket(t.TempDir(), blob.BucketOptions{URL: tt.url})
		if got := fmt.Sprint(err); (err == nil) != (tt.want == "") || !strings.Contains(got, tt.want) || strings.Contains(got, "sec") && !strings.Contains(got, "secrets") {
			t.Errorf("OpenBucket(%q) = %v, want %q", tt.url, err, tt.want)
		}
	}
}

// TestBucketEnvironment: credentials and place may come from where other tools have them.
func TestBucketEnvironment(t *testing.T) {
	s := blobtest.StartServer(t)
	_, name := newBucket(t, s)
	t.Setenv("AWS_ACCESS_KEY_ID", s.Access)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s.Secret)
	t.Setenv("AWS_ENDPOINT_URL", "http://"+s.Addr)
	b := openBucket(t, t.TempDir(), blob.BucketOptions{URL: "s3://" + name})
	if err := b.Verify(t.Context(), put(t, b, "x")); err != nil {
		t.Error(err)
	}
}
