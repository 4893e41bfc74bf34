package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// How long things may take. A commit gives up after commitTime in all, whatever Redis
// does; reads, and each try of a commit, after opTime.
const (
	opTime     = 3 * time.Second
	commitTime = 5 * time.Second
	dialTime   = 2 * time.Second
)

// Durability is what a URL asks of Redis.
const (
	durableAuto   = "auto"
	durableAlways = "always"
	durableNone   = "none"
)

// A place is what a URL of RedisOptions says.
type place struct {
	opts       redis.UniversalOptions
	durability string
	name       string
}

// CheckRedisURL returns what is wrong with a URL of RedisOptions, without its password.
// It does not speak to anybody, but reads the certificates that it names.
func CheckRedisURL(url string) error {
	_, err := parseRedisURL(url)
	return err
}

// IsRedisURL reports whether text is meant to be a URL of RedisOptions.
func IsRedisURL(text string) bool {
	scheme, _, ok := strings.Cut(text, ":")
	return ok && slices.Contains([]string{"redis", "rediss", "unix"}, scheme)
}

func parseRedisURL(text string) (*place, error) {
	u, err := url.Parse(text)
	if err != nil { // its text may have parts of the password
		return nil, errors.New("the URL of Redis cannot be read: it looks like redis://user:password@host:6379/0, and in a password @ : / ? # and % are written as %40 %3A %2F %3F %23 and %25")
	}
	p := &place{durability: durableAuto, name: "rai"}
	p.opts = redis.UniversalOptions{
		MaxRetries:               -1,   // what may have been done is not done again blindly
		ContextTimeoutEnabled:    true, // else a hung Redis holds a call for seconds
		DialTimeout:              dialTime,
		DialerRetries:            1,
		ReadTimeout:              opTime,
		WriteTimeout:             opTime,
		PoolTimeout:              opTime,
		PoolSize:                 16,
		ReadBufferSize:           256 << 10, // bytes: rows come by the megabyte
		WriteBufferSize:          256 << 10,
		PipelinePoolSize:         -1,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	if u.User != nil {
		p.opts.Username = u.User.Username()
		p.opts.Password, _ = u.User.Password()
	}
	q := &params{left: u.Query()}
	if err := p.where(u, q); err != nil {
		return nil, err
	}
	if err := p.how(q); err != nil {
		return nil, err
	}
	if err := q.rest(); err != nil {
		return nil, err
	}
	return p, nil
}

// where reads who is meant.
func (p *place) where(u *url.URL, q *params) (err error) {
	switch u.Scheme {
	case "unix":
		if u.Path == "" || u.Host != "" {
			return errors.New("the URL of Redis names no socket: it looks like unix:///run/redis/redis.sock?db=0")
		}
		p.opts.Addrs = []string{u.Path}
		p.opts.Dialer = func(ctx context.Context, _, addr string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "unix", addr)
		}
		p.opts.DB, err = database(q.take("db"))
		return err
	case "redis", "rediss":
	default:
		return fmt.Errorf("the URL of Redis begins with redis://, rediss:// or unix://, not %q", u.Scheme)
	}
	if u.Hostname() == "" {
		return errors.New("the URL of Redis names no host: it looks like redis://host:6379/0")
	}
	if p.opts.DB, err = database(strings.TrimPrefix(u.Path, "/")); err != nil {
		return err
	}
	port := "6379"
	if p.opts.MasterName = q.take("master"); p.opts.MasterName != "" {
		port = "26379"
	}
	p.opts.SentinelUsername, p.opts.SentinelPassword = q.take("sentinel_user"), q.take("sentinel_password")
	switch cluster := q.take("cluster"); {
	case cluster != "" && cluster != "true" && cluster != "false":
		return fmt.Errorf("cluster=%s in the URL of Redis: it is true or false", cluster)
	case cluster == "true" && p.opts.MasterName != "":
		return errors.New("the URL of Redis has both cluster and master: Sentinels do not watch a cluster")
	case cluster == "true" && p.opts.DB != 0:
		return errors.New("a Redis cluster has only the database 0")
	default:
		p.opts.IsClusterMode = cluster == "true"
	}
	p.opts.Addrs = []string{address(u.Host, port)}
	for _, a := range q.takeAll("addr") {
		p.opts.Addrs = append(p.opts.Addrs, address(a, port))
	}
	switch {
	case len(p.opts.Addrs) > 1 && !p.opts.IsClusterMode && p.opts.MasterName == "":
		return errors.New("the URL of Redis has several addresses: say cluster=true, or master=NAME for Sentinels")
	case p.opts.SentinelUsername+p.opts.SentinelPassword != "" && p.opts.MasterName == "":
		return errors.New("sentinel_user and sentinel_password in the URL of Redis need master=NAME")
	}
	if u.Scheme == "rediss" {
		p.opts.TLSConfig, err = tlsConfig(u.Hostname(), q)
	}
	return err
}

// how reads what is asked of it.
func (p *place) how(q *params) error {
	if d := q.take("durability"); d != "" {
		p.durability = d
	}
	if !slices.Contains([]string{durableAuto, durableAlways, durableNone}, p.durability) {
		return fmt.Errorf("durability=%s in the URL of Redis: it is auto, always or none", p.durability)
	}
	if n := q.take("name"); n != "" {
		p.name = n
	}
	if strings.IndexFunc(p.name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-' && r != '.'
	}) >= 0 {
		return fmt.Errorf("name=%s in the URL of Redis: it is letters, digits, - . and _", p.name)
	}
	return nil
}

// database reads the number of a database, "" for the first.
func database(text string) (int, error) {
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("the URL of Redis names the database %q: it is a number, most often 0 to 15", text)
	}
	return int(n), nil
}

// address adds the port if there is none.
func address(host, port string) string {
	if _, p, err := net.SplitHostPort(host); err == nil && p != "" {
		return host
	}
	return net.JoinHostPort(strings.Trim(strings.TrimSuffix(host, ":"), "[]"), port)
}

func tlsConfig(host string, q *params) (*tls.Config, error) {
	c := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if ca := q.take("ca"); ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("ca in the URL of Redis: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca in the URL of Redis: there is no certificate in %s", ca)
		}
	}
	cert, key := q.take("cert"), q.take("key")
	if cert == "" && key == "" {
		return c, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("cert and key in the URL of Redis: %w", err)
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

// params are those of a URL that nobody has taken yet.
type params struct{ left url.Values }

func (p *params) take(name string) string {
	defer delete(p.left, name)
	return p.left.Get(name)
}

func (p *params) takeAll(name string) []string {
	defer delete(p.left, name)
	return p.left[name]
}

// rest returns an error if any are left.
func (p *params) rest() error {
	for name := range p.left {
		return fmt.Errorf("the URL of Redis has %q, which means nothing here", name)
	}
	return nil
}

// dial makes a client. It speaks to nobody yet.
func (p *place) dial() redis.UniversalClient {
	redis.SetLogger(silence{})
	return redis.NewUniversalClient(&p.opts)
}

// silence is for go-redis's own log, which repeats on every try what an error says once.
type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}
