package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/cluster"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// among serves as one raid of a deployment whose state is in Redis.
func (h *house) among(ctx context.Context) error {
	lock, err := store.Lock(h.state.dir)
	if err != nil {
		return inUse(err, h.state.dir)
	}
	defer lock.Close()
	if err := h.state.sweep(); err != nil {
		return err
	}
	if _, err := ensureKey(filepath.Join(h.state.dir, "door_key"), "raid door key"); err != nil {
		return err
	}
	own, err := keys.LoadSigner(filepath.Join(h.state.dir, "door_key"), nil)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(h.Blobs.URL, "s3:") {
		h.log.Warn("uploads and outputs are in a folder: another raid that takes over has them only if [blobs] url is a bucket")
	}
	redis, err := h.openRedis(ctx)
	if err != nil {
		return cli.Hintf(err, "raid doctor looks at Redis, too")
	}
	defer redis.Close()
	l, err := h.listen(ctx)
	if err != nil {
		return err
	}
	var nb neighbours
	addr := cmp.Or(h.Queue.Advertise, reachable(l.Addr()))
	raid, err := cluster.New(cluster.Config{
		HostKeys: []ssh.Signer{h.state.host}, Own: own, Addr: addr, Version: version().Build(),
		Redis: redis, Logf: h.log.Infof,
		Lead:   func(ctx context.Context) (cluster.Leader, error) { return h.lead(ctx, redis, own) },
		Forget: func() error { return sshd.Forget(h.state.dir) },
		Others: func(others []store.Member) {
			h.compare(version().Build(), others)
			h.say("tell local runners of other raids", nb.meet(others))
		},
	})
	if err != nil {
		return err
	}
	return h.open(ctx, l, raid, func(ctx context.Context) ([]slot, error) {
		h.ready(l.Addr())
		slots, err := prepareSlots(ctx, h.config, h.state, &overSSH{house: h, addr: dialable(l.Addr())}, l.Addr(), slotPrefix(addr), h.log)
		if ctx.Err() != nil {
			return nil, nil
		}
		h.say("tell local runners of other raids", nb.open(slots))
		return slots, err
	})
}

// say logs an error that stops nothing.
func (h *house) say(what string, err error) {
	if err != nil {
		h.log.Error(what, "err", err)
	}
}

// compare warns of raids that run another version than this one.
func (h *house) compare(mine string, others []store.Member) {
	for _, m := range others {
		if m.Version != mine {
			h.log.Warn("another raid runs another version: not for longer than an upgrade takes",
				"raid", m.Addr, "runs", cmp.Or(m.Version, "unknown"), "this", mine)
		}
	}
}

// neighbours are the other raids, as local runners know them: one that has lost its own
// raid goes to another with its job.
type neighbours struct {
	mu    sync.Mutex // guards the following
	addrs []string
	slots []slot
}

// meet is told where the other raids are.
func (n *neighbours) meet(others []store.Member) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs = nil
	for _, m := range others {
		n.addrs = append(n.addrs, m.Addr)
	}
	return n.write()
}

// open is told which runners there are.
func (n *neighbours) open(slots []slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slots = slots
	return n.write()
}

func (n *neighbours) write() error {
	var errs []error
	for i := range n.slots {
		f, err := readSlot(n.slots[i].dir)
		if err == nil {
			f.Servers = append(f.Servers[:1:1], n.addrs...)
			err = n.slots[i].write(f)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// openRedis has some patience with a Redis that is just starting, too.
func (h *house) openRedis(ctx context.Context) (*store.Redis, error) {
	patience, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		redis, err := store.OpenRedis(ctx, store.RedisOptions{URL: h.Queue.Store, Logf: h.log.Warnf})
		if err == nil || !errors.Is(err, store.ErrUnavailable) {
			return redis, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-patience.Done():
			return nil, err
		}
	}
}

// reachable is the address of a listener for other machines.
func reachable(a net.Addr) string {
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	return net.JoinHostPort(host, port)
}

// slotPrefix names local runners after the machine, since every raid has some.
func slotPrefix(addr string) string {
	host, _, _ := strings.Cut(addr, ":")
	host = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return -1
	}, strings.ToLower(host))
	return cmp.Or(strings.TrimLeft(host[:min(len(host), 24)], ".-"), "local")
}

// Where the deployment says whose output was the newest.
const (
	tableLed = "led"
	keyLast  = "last"
)

// lead makes the leader of a term. Output of unfinished jobs that is here counts only if
// no other raid has led since: the runners send it again.
func (h *house) lead(ctx context.Context, redis *store.Redis, own ssh.Signer) (cluster.Leader, error) {
	me := ssh.FingerprintSHA256(own.PublicKey())
	last, err := redis.Get(ctx, tableLed, keyLast)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	stale := string(last) != me
	if stale {
		rev, err := redis.Load(ctx, nil, nil)
		if err != nil {
			return nil, err
		}
		if _, err := redis.Commit(ctx, rev, []queue.Write{{Row: queue.Row{Table: tableLed, Key: keyLast, Value: []byte(me)}}}); err != nil {
			return nil, err
		}
	}
	srv, err := h.server(ctx, redis, func(c *sshd.Config) { c.Stale, c.Raids = stale, raidsOf(redis) })
	if _, hint := cli.Verdict(err, 0); hint != "" { // it goes to the log, and raid tries again
		return nil, fmt.Errorf("%w: %s", err, hint)
	}
	return srv, err
}

// raidsOf lists the raids of a deployment, sorted by address.
func raidsOf(redis *store.Redis) func(context.Context) ([]sshd.Raid, error) {
	return func(ctx context.Context) (all []sshd.Raid, err error) {
		leader, err := redis.Leader(ctx)
		if err != nil {
			return nil, err
		}
		doors, err := redis.Doors(ctx)
		for _, m := range doors {
			all = append(all, sshd.Raid{Addr: m.Addr, Leads: m.ID == leader.ID, Version: m.Version})
		}
		slices.SortFunc(all, func(a, b sshd.Raid) int { return strings.Compare(a.Addr, b.Addr) })
		return all, err
	}
}

// overSSH enters local runners into the books of whoever leads, with the admin's key.
type overSSH struct {
	*house
	addr string
}

// Enrolled implements registrar: it does not know, and enrolling again does no harm.
func (o *overSSH) Enrolled(string) bool { return false }

// Local implements registrar. The leader may be on another machine: output is sent.
func (o *overSSH) Local(string, string) error { return nil }

// Enrol implements registrar. It goes on trying until ctx ends, as some raid will lead.
func (o *overSSH) Enrol(ctx context.Context, e keys.Enrollment, _ string) (u keys.User, k keys.Key, err error) {
	e.LoopbackOnly = false // the runner may have to go to another machine's raid
	line, err := json.Marshal(e)
	if err != nil {
		return u, k, err
	}
	for first := true; ; first = false {
		status, out, err := o.admin(ctx, line)
		switch {
		case ctx.Err() != nil:
			return u, k, context.Cause(ctx)
		case err == nil && status == 0:
			return u, k, nil
		case err == nil && status != job.ExitTryLater:
			return u, k, fmt.Errorf("enrol the runner %s: %s", e.User, out)
		case first:
			o.log.Info("local runners wait until a raid leads", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// admin has one line enrolled.
func (o *overSSH) admin(ctx context.Context, line []byte) (status int, out string, err error) {
	signer, err := keys.LoadSigner(filepath.Join(o.state.dir, "admin"), nil)
	if err != nil {
		return 0, "", err
	}
	c, err := dial.Dial(ctx, dial.Target{User: "raid", Addr: o.addr, Signers: []ssh.Signer{signer},
		HostKeys: []string{strings.TrimSpace(string(ssh.MarshalAuthorizedKey(o.state.host.PublicKey())))}})
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	var b bytes.Buffer
	status, err = c.Run(ctx, "admin enroll", bytes.NewReader(append(line, '\n')), &b, &b)
	return status, strings.TrimSpace(b.String()), err
}
