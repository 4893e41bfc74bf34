package blob

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// An address is what the URL of a bucket says.
type address struct {
	bucket, prefix   string // prefix is "" or ends in a slash
	endpoint, public string // https://host[:port]; public is for links
	region           string
	style            minio.BucketLookupType
	ca               string // a file of certificates to trust beside the system's
	key, secret      string // "": as the environment says
	amazon           bool
}

var styles = map[string]minio.BucketLookupType{"": minio.BucketLookupAuto, "path": minio.BucketLookupPath, "virtual": minio.BucketLookupDNS}

// parseURL reads the URL of a bucket. Its errors do not show it: there are secrets in it.
func parseURL(text string) (*address, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "s3" || u.Hostname() == "" || u.Port() != "" || u.Opaque != "" || u.Fragment != "" {
		return nil, errors.New("a bucket looks like s3://BUCKET/PREFIX?endpoint=https://s3.example.org, with % in secrets written as %25")
	}
	a := &address{bucket: u.Hostname(), prefix: strings.TrimPrefix(u.Path, "/"), key: u.User.Username()}
	a.secret, _ = u.User.Password()
	if a.prefix != "" {
		a.prefix = strings.TrimRight(a.prefix, "/") + "/"
	}
	if (a.key == "") != (a.secret == "") {
		return nil, errors.New("s3://KEY:SECRET@BUCKET needs both, or neither")
	}
	return a, a.parameters(u.Query())
}

// CheckURL says what is wrong with the URL of a bucket, without what is secret in it.
func CheckURL(text string) error {
	_, err := parseURL(text)
	return err
}

func (a *address) parameters(q url.Values) (err error) {
	for name, v := range q {
		switch text := v[len(v)-1]; name {
		case "endpoint":
			a.endpoint = text
		case "public":
			a.public = text
		case "region":
			a.region = text
		case "ca":
			a.ca = text
		case "style":
			var ok bool
			if a.style, ok = styles[text]; !ok {
				return fmt.Errorf("style=%.20s: it is path or virtual", text)
			}
		default:
			return fmt.Errorf("unknown parameter %.40q: there are endpoint, public, region, style and ca", name)
		}
	}
	a.region = cmp.Or(a.region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"), "us-east-1")
	a.endpoint = cmp.Or(a.endpoint, os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL"))
	if a.endpoint == "" {
		a.amazon, a.endpoint = true, "https://s3."+a.region+".amazonaws.com"
	}
	if a.endpoint, err = whole(a.endpoint); err == nil {
		a.public, err = whole(cmp.Or(a.public, a.endpoint))
	}
	return err
}

// whole makes a URL of a host, by TLS if nothing else is said.
func whole(host string) (string, error) {
	if !strings.Contains(host, "://") {
		host = "https://" + host
	}
	u, err := url.Parse(host)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil {
		return "", fmt.Errorf("%.80q: an endpoint looks like https://s3.example.org:9000", host)
	}
	return u.Scheme + "://" + u.Host, nil
}

func (a *address) client(endpoint string, stall time.Duration) (*minio.Client, error) {
	host, secure := strings.CutPrefix(endpoint, "https://")
	host = strings.TrimPrefix(host, "http://")
	transport, err := a.transport(stall)
	if err != nil {
		return nil, err
	}
	c, err := minio.New(host, &minio.Options{Creds: a.credentials(transport), Secure: secure, Transport: secondTry{transport},
		Region: a.region, BucketLookup: a.style, MaxRetries: 3})
	if err != nil {
		return nil, fmt.Errorf("S3: %w", err)
	}
	c.SetAppInfo("raid", "1")
	return c, nil
}

func (a *address) credentials(transport http.RoundTripper) *credentials.Credentials {
	if a.key != "" {
		return credentials.NewStaticV4(a.key, a.secret, "")
	}
	chain := []credentials.Provider{&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}}
	if a.amazon { // elsewhere nobody would answer
		chain = append(chain, &credentials.IAM{Client: &http.Client{Transport: transport}})
	}
	return credentials.NewChainCredentials(chain)
}

// transport is how requests travel: none waits longer than stall for the other side to
// take or give another byte.
func (a *address) transport(stall time.Duration) (*http.Transport, error) {
	d := &net.Dialer{Timeout: min(stall, 10*time.Second)}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := d.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stallConn{c, stall}, nil
		},
		TLSHandshakeTimeout: min(stall, 10*time.Second), TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
		MaxIdleConnsPerHost: 16, IdleConnTimeout: stall / 2, ExpectContinueTimeout: time.Second,
		DisableCompression: true, // blobs are not to be unpacked on their way
	}
	if a.ca == "" {
		return t, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	pem, err := os.ReadFile(a.ca)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("ca: no certificate in %s", a.ca)
	}
	t.TLSClientConfig.RootCAs = pool
	return t, nil
}

// A secondTry asks again when a request is answered that it could not be read, on a
// connection that ends with that. Some servers say so on an idle connection which they are
// about to close; a request just on its way takes it for its own answer. One with a body
// fails as if the connection had broken: minio-go rewinds what it sent and tries again.
type secondTry struct{ http.RoundTripper }

func (s secondTry) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.send(r)
	if err != nil || resp.StatusCode != http.StatusBadRequest || !resp.Close {
		return resp, err
	}
	defer resp.Body.Close()
	if r.Body != nil && r.Body != http.NoBody {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("the server ended the connection with %s: %s", resp.Status, said)
	}
	return s.RoundTripper.RoundTrip(r.Clone(r.Context()))
}

// mostSaid is more than a server has to say of an error.
const mostSaid = 64 << 10

// send returns what is no success once nobody reads the request's body any more. net/http
// goes on sending for a moment after it has an answer (see [http.RoundTripper]), and
// minio-go, which tries again, rewinds the same body.
func (s secondTry) send(r *http.Request) (*http.Response, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return s.RoundTripper.RoundTrip(r)
	}
	b := &sentBody{ReadCloser: r.Body, left: make(chan struct{})}
	r = r.WithContext(r.Context()) // the caller's stays as it is
	r.Body = b
	resp, err := s.RoundTripper.RoundTrip(r)
	if err == nil && resp.StatusCode < http.StatusMultipleChoices {
		return resp, nil
	}
	if err == nil { // it is what ends the sending
		said, _ := io.ReadAll(io.LimitReader(resp.Body, mostSaid))
		resp.Body.Close()
		resp.Body = io.NopCloser(bytes.NewReader(said))
	}
	<-b.left
	return resp, err
}

// A sentBody tells when it is read no more: a transport closes it in any case.
type sentBody struct {
	io.ReadCloser
	once sync.Once
	left chan struct{} // closed then
}

func (b *sentBody) Close() error {
	defer b.once.Do(func() { close(b.left) })
	return b.ReadCloser.Close()
}

// A stallConn ends when nothing moves. A deadline for whole requests would have to allow
// for the largest blob on the slowest line.
type stallConn struct {
	net.Conn
	stall time.Duration
}

func (c *stallConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// Write moves the deadline of a Read that waits for the answer, too.
func (c *stallConn) Write(p []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// classify says what an error of a client means, in this package's words.
func (b *Bucket) classify(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var r minio.ErrorResponse
	if !errors.As(err, &r) {
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
	}
	is, hint := ErrUnavailable, ""
	switch {
	case r.Code == "NoSuchBucket":
		is, hint = ErrDenied, ": there is no bucket "+b.at.bucket
	case r.Code == "RequestTimeTooSkewed":
		is, hint = ErrDenied, ": the clocks of this machine and the store differ"
	case r.Code == "InvalidAccessKeyId", r.Code == "SignatureDoesNotMatch", r.Code == "InvalidToken", r.Code == "ExpiredToken":
		is, hint = ErrDenied, ": the credentials are wrong, or for another region"
	case r.StatusCode == http.StatusForbidden, r.StatusCode == http.StatusUnauthorized:
		is, hint = ErrDenied, ": the credentials need to read, write, delete and list in "+b.at.bucket+"/"+b.at.prefix
	case r.StatusCode == http.StatusNotFound, r.Code == "NoSuchKey", r.Code == "NoSuchUpload":
		is = ErrNotFound
	case r.StatusCode == http.StatusInsufficientStorage, strings.Contains(r.Code, "StorageFull"), strings.Contains(r.Code, "QuotaExceeded"):
		is = ErrNoSpace
	}
	return fmt.Errorf("%w%s: %s: %s (%s)", is, hint, what, r.Error(), r.Code)
}
