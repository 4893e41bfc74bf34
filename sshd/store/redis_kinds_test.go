package store_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// works commits to what a URL names, and reads it back.
func works(t *testing.T, url string) {
	t.Helper()
	r := openURL(t, url)
	a := &account{t: t, Redis: r}
	for range 3 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	a.reload(false)
	if rows, err := r.List(t.Context(), "all", 0, 9); len(rows) != 3 || err != nil {
		t.Errorf("List = %d rows, %v, want 3", len(rows), err)
	}
	l, err := r.Campaign(soon(t), store.Member{ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.PutDoor(t.Context(), "f", store.Member{ID: "a"}); err != nil {
		t.Error(err)
	}
	if err := r.Claim(t.Context(), l); err != nil {
		t.Error(err)
	}
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestRedisTLS: rediss:// with a certificate of one's own, on both sides; none is no way in.
func TestRedisTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := selfSigned(t, dir)
	port := redistest.Port(t, "127.0.0.1")
	startRedis(t, "--tls-port", port, "--bind", "127.0.0.1", "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "yes")
	at := "rediss://127.0.0.1:" + port + "?ca=" + url.QueryEscape(cert)
	works(t, at+"&cert="+url.QueryEscape(cert)+"&key="+url.QueryEscape(key))
	for _, bad := range []string{at, "rediss://127.0.0.1:" + port, "redis://127.0.0.1:" + port} {
		if r, err := store.OpenRedis(soon(t), store.RedisOptions{URL: bad}); err == nil {
			r.Close()
			t.Errorf("OpenRedis(%s) worked", bad)
		}
	}
}

// selfSigned writes a certificate for 127.0.0.1 and its key.
func selfSigned(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: text}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestRedisCluster: everything is in one slot, wherever that is.
func TestRedisCluster(t *testing.T) {
	var nodes []string
	var db *redis.Client
	for i := range 2 { // as many as it takes for a slot to be elsewhere
		port := redistest.Port(t, "127.0.0.1")
		startRedis(t, "--cluster-enabled", "yes", "--port", port, "--bind", "127.0.0.1", "--cluster-announce-ip", "127.0.0.1")
		nodes = append(nodes, "127.0.0.1:"+port)
		db = redis.NewClient(&redis.Options{Addr: nodes[i], DisableIdentity: true})
		defer db.Close()
		if err := db.ClusterAddSlotsRange(t.Context(), i*8192, i*8192+8191).Err(); err != nil {
			t.Fatal(err)
		}
	}
	host, port, _ := net.SplitHostPort(nodes[0])
	if err := db.ClusterMeet(t.Context(), host, port).Err(); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(db.ClusterInfo(t.Context()).Val(), "cluster_state:ok") {
		pauseABit()
	}
	first := redis.NewClient(&redis.Options{Addr: nodes[0], DisableIdentity: true})
	defer first.Close()
	for !strings.Contains(first.ClusterInfo(t.Context()).Val(), "cluster_state:ok") {
		pauseABit()
	}
	for _, name := range []string{"rai", "b", "c", "d"} { // of which some are in either half
		works(t, fmt.Sprintf("redis://%s?cluster=true&addr=%s&name=%s", nodes[0], nodes[1], name))
	}
}

// TestRedisSentinel: the master is found by those who watch it.
func TestRedisSentinel(t *testing.T) {
	port, watcher := redistest.Port(t, "127.0.0.1"), redistest.Port(t, "127.0.0.1")
	startRedis(t, "--port", port, "--bind", "127.0.0.1")
	conf := filepath.Join(t.TempDir(), "sentinel.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "sentinel monitor m 127.0.0.1 %s 1\n", port), 0o600); err != nil {
		t.Fatal(err)
	}
	startSentinel(t, conf, watcher)
	works(t, "redis://127.0.0.1:"+watcher+"?master=m")
	if r, err := store.OpenRedis(soon(t), store.RedisOptions{URL: "redis://127.0.0.1:" + watcher + "?master=other"}); err == nil {
		r.Close()
		t.Error("OpenRedis of a master that nobody knows worked")
	}
}

// TestRedisFailover: the master dies, Sentinel makes its replica the master, and the store
// goes on there with all that the replica has heard of; the old one comes back and changes
// nothing.
func TestRedisFailover(t *testing.T) {
	port, second, watcher := redistest.Port(t, "127.0.0.1"), redistest.Port(t, "127.0.0.1"), redistest.Port(t, "127.0.0.1")
	first := startRedis(t, "--port", port, "--bind", "127.0.0.1")
	startRedis(t, "--port", second, "--bind", "127.0.0.1", "--replicaof", "127.0.0.1 "+port)
	conf := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("sentinel monitor m 127.0.0.1 %s 1\nsentinel down-after-milliseconds m 500\nsentinel failover-timeout m 3000\n", port)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	startSentinel(t, conf, watcher)
	sentinel := redis.NewSentinelClient(&redis.Options{Addr: "127.0.0.1:" + watcher, DisableIdentity: true})
	defer sentinel.Close()
	for {
		if known, err := sentinel.Replicas(t.Context(), "m").Result(); err == nil && len(known) == 1 && known[0]["master-link-status"] == "ok" {
			break
		}
		pauseABit()
	}
	a := &account{t: t, Redis: openURL(t, "redis://127.0.0.1:"+watcher+"?master=m")}
	for range 20 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	db := first.client()
	if n, err := db.Do(t.Context(), "WAIT", 1, 10_000).Int(); err != nil || n != 1 {
		t.Fatalf("WAIT = %d, %v: the replica has not heard of all", n, err)
	}
	first.kill()
	for a.commit() != nil {
		pauseABit()
	}
	first.start()
	for range 20 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	a.reload(false)
	if at, err := sentinel.GetMasterAddrByName(t.Context(), "m").Result(); err != nil || at[1] != second {
		t.Errorf("the master is at %v, %v, want %s", at, err, second)
	}
}

func startSentinel(t *testing.T, conf, port string) {
	t.Helper()
	redistest.StartPlain(t, conf, "--sentinel", "--port", port, "--bind", "127.0.0.1")
}
