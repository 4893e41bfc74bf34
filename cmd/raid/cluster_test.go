package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob/blobtest"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// TestCluster is TestCrash with three raids on one Redis and one bucket: they, their runners and Redis
// are killed at random moments, and each is cut off from Redis now and then.
//
// RAID_CLUSTER_ROUNDS says how often, RAID_CRASH_SEED how.
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a minute")
	}
	need(t, "bwrap", "redis-server")
	t.Parallel()
	rounds, seed := envInt(t, "RAID_CLUSTER_ROUNDS", 30), envInt(t, "RAID_CRASH_SEED", time.Now().UnixNano())
	t.Logf("RAID_CLUSTER_ROUNDS=%d RAID_CRASH_SEED=%d", rounds, seed)
	c := newCluster(t, uint64(seed), 1)
	c.endure(rounds, 2*patience, c.harm)
}

// A clusterTest is a crash of three raids, with what they depend on.
type clusterTest struct {
	*crash
	redis   *process
	dir     string   // its folder
	port    string   // of Redis, always the same one
	proxies []*proxy // the raids' ways to Redis
}

const clusterSize = 3

// newCluster starts three raids; local says how many runners each has of its own.
func newCluster(t *testing.T, seed uint64, local int) *clusterTest {
	c := &clusterTest{crash: emptyCrash(t, seed)}
	dir := sharedTemp(t)
	s3 := blobtest.StartServer(t)
	bucket, err := s3.NewBucket(t.Context())
	c.must(err)
	c.port = redistest.Port(c.T, crashHost)
	for i := range clusterSize {
		p, err := newProxy(crashHost, crashHost, c.port)
		c.must(err)
		c.proxies = append(c.proxies, p)
		c.build(fmt.Sprintf("127.0.0.%d", 84+i), fmt.Sprintf(
			"[queue]\nstore = \"redis://%s:%s/0?durability=always\"\n[blobs]\nurl = %q\n[runners]\nlocal = %d\n",
			crashHost, p.port, s3.URL(bucket), local))
	}
	t.Cleanup(func() {
		c.end()
		for _, p := range c.proxies {
			p.close()
		}
		if c.redis != nil {
			c.bury(c.redis)
		}
	})
	c.dir = dir
	c.startRedis()
	for i, h := range c.houses {
		if i > 0 {
			c.must(os.Mkdir(h.w.state, 0o700))
			for _, name := range []string{"host_key", "host_key.pub", "admin", "admin.pub"} {
				b, err := os.ReadFile(filepath.Join(c.w.state, name))
				c.must(err)
				c.must(os.WriteFile(filepath.Join(h.w.state, name), b, 0o600))
			}
		}
		c.startRaid(h)
		if i == 0 { // the others find it so
			ctx, cancel := context.WithTimeout(c.Context(), patience)
			_, err := h.w.raid.both.await(ctx, itLeads)
			cancel()
			c.must(err)
		}
	}
	c.invite(seed)
	return c
}

func (c *clusterTest) startRedis() {
	c.redis = c.spawn("redis-server", "--bind", crashHost, "--port", c.port, "--dir", c.dir, "--save", "",
		"--appendonly", "yes", "--appendfsync", "always")
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	_, err := c.redis.both.await(ctx, redisReady)
	c.must(err)
}

func (c *clusterTest) signalRedis(s syscall.Signal) { c.must(c.redis.cmd.Process.Signal(s)) }

// harm lets a random moment pass and does one bad thing.
func (c *clusterTest) harm() {
	switch n := c.rnd.IntN(10); {
	case n < 6:
		c.kill()
	case n < 8: // cut one raid off, for a moment or for longer than its lease
		c.pass(c.rnd.IntN(500))
		c.kills["way to Redis"]++
		p := c.proxies[c.rnd.IntN(clusterSize)]
		p.cut()
		c.pass(c.rnd.IntN(6000))
		p.mend()
	case n < 9: // Redis stands still
		c.kills["Redis stopped"]++
		c.signalRedis(syscall.SIGSTOP)
		c.pass(c.rnd.IntN(4000))
		c.signalRedis(syscall.SIGCONT)
	default:
		c.kills["Redis"]++
		c.bury(c.redis)
		c.pass(c.rnd.IntN(2000))
		c.startRedis()
	}
}

// TestFailover follows single jobs through the death of the raid that leads, and through
// a Redis that is away for longer than anybody waits for it: they go on, on attempt 1, and
// nothing of their output is lost.
func TestFailover(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	need(t, "bwrap", "redis-server")
	t.Parallel()
	c := newCluster(t, 1, 0)
	ada := c.people[0].key

	// The one who leads dies. Who followed through another door is told, and goes on.
	end := c.submitTo(c.houses[1], ada, 4)
	c.pass(1500)
	killed := time.Now()
	c.killRaid(c.houses[0])
	id, said := end()
	if said.status != job.ExitTryLater || !bytes.Contains(said.err, []byte("attach JOB")) {
		t.Errorf("the session of job %d ended with %d: %s", id, said.status, said.err)
	}
	c.whole(id, c.attach(c.houses[2], ada, id), 4)
	t.Logf("the client was told; attach brought all by %v after the kill", time.Since(killed).Round(100*time.Millisecond))
	c.startRaid(c.houses[0])

	if all := c.try(c.houses[1], c.adminKey(), "admin raids --json").out; bytes.Count(all, []byte("\n")) != clusterSize || bytes.Count(all, []byte(`"leads":true`)) != 1 {
		t.Errorf("admin raids:\n%s", all)
	}

	// Redis is away: nothing is accepted, what runs goes on, and is there in the end.
	end = c.submitTo(c.houses[0], ada, 14)
	c.pass(1000)
	c.bury(c.redis)
	away := time.Now()
	if s := c.try(c.houses[1], ada, "submit -- echo no"); s.status != job.ExitTryLater || !bytes.Contains(s.err, []byte("saved")) && !bytes.Contains(s.err, []byte("save")) {
		t.Errorf("a submit without Redis ended with %d: %s", s.status, s.err)
	}
	c.pass(int(15000 - time.Since(away).Milliseconds()))
	c.startRedis()
	id, said = end()
	if said.status != 0 {
		said = c.attach(c.houses[2], ada, id)
	}
	c.whole(id, said, 14)
	c.stop()
}

// submitTo submits a job of so many seconds at a house, and returns what waits for the
// session's end.
func (c *clusterTest) submitTo(h *crashHouse, key ssh.Signer, seconds int) func() (int64, said) {
	c.Helper()
	result := make(chan said, 1)
	started := newTape()
	conn := c.dialHouse(h, key)
	go func() { // ends with the session
		defer conn.Close()
		result <- askTo(conn, fmt.Sprintf("submit -- for i in $(seq %d0); do echo line $i; sleep 0.1; done", seconds), started)
	}()
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	m, err := started.await(ctx, jobQueued)
	c.must(err)
	id, err := strconv.ParseInt(m[1], 10, 64)
	c.must(err)
	return func() (int64, said) {
		select {
		case s := <-result:
			return id, s
		case <-time.After(patience):
			conn.Close()
			return id, <-result
		}
	}
}

var jobQueued = regexp.MustCompile(`raid: job (\d+) queued`)

func (c *clusterTest) dialHouse(h *crashHouse, key ssh.Signer) *ssh.Client {
	c.Helper()
	conn, err := ssh.Dial("tcp", h.addr, &ssh.ClientConfig{User: "rai", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 20 * time.Second})
	c.must(err)
	return conn
}

// try runs a command at a house.
func (c *clusterTest) try(h *crashHouse, key ssh.Signer, command string) said {
	c.Helper()
	conn := c.dialHouse(h, key)
	defer conn.Close()
	return ask(conn, command)
}

// attach follows a job to its end, as often as a raid asks to try again.
func (c *clusterTest) attach(h *crashHouse, key ssh.Signer, id int64) (s said) {
	c.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if s = c.try(h, key, fmt.Sprint("attach ", id)); s.whole && s.status != job.ExitTryLater {
			return s
		}
	}
	c.Errorf("attach %d ended with %d: %s", id, s.status, s.err)
	return s
}

// whole checks that a session brought all that a job of submitTo prints, on its first attempt.
func (c *clusterTest) whole(id int64, s said, seconds int) {
	c.Helper()
	var want bytes.Buffer
	for i := range seconds * 10 {
		fmt.Fprintln(&want, "line", i+1)
	}
	if s.status != 0 || !bytes.Equal(s.out, want.Bytes()) {
		c.Errorf("job %d ended with %d: %s\n%s", id, s.status, firstDifference(string(s.out), want.String()), s.err)
	}
	conn := c.admin()
	defer conn.Close()
	var j job.Job
	c.must(json.Unmarshal(c.ask(conn, fmt.Sprintf("status %d --json", id)), &j))
	if j.Attempt != 1 || j.State != job.Succeeded {
		c.Errorf("job %d is %s on attempt %d, want succeeded on the first", id, j.State, j.Attempt)
	}
}
