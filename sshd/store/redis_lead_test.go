package store_test

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/sshd/store"
)

// campaign runs in the background.
func campaign(t *testing.T, r *store.Redis, id string) <-chan *store.Lease {
	won := make(chan *store.Lease, 1)
	go func() { // ends with soon
		l, err := r.Campaign(soon(t), store.Member{ID: id, Addr: id + ":1"})
		if err != nil {
			t.Error(err)
		}
		won <- l
	}()
	return won
}

// TestLease: one leads at a time; resigning hands over at once, and the end of a leader
// that is not heard of any more is seen when its lease runs out.
func TestLease(t *testing.T) {
	s, name := startRedis(t), newName()
	a, b, c := s.open(name), s.open(name), s.open(name)
	if m, err := c.Leader(t.Context()); !errors.Is(err, store.ErrNoMember) {
		t.Errorf("Leader = %+v, %v, want ErrNoMember", m, err)
	}
	first := <-campaign(t, a, "a")
	if m, err := c.AwaitLeader(soon(t), ""); m.ID != "a" || m.Addr != "a:1" || err != nil {
		t.Errorf("AwaitLeader = %+v, %v, want a", m, err)
	}
	second := campaign(t, b, "b")
	next := make(chan store.Member, 1)
	go func() { // ends with soon
		m, _ := c.AwaitLeader(soon(t), "a")
		next <- m
	}()
	if err := first.Err(); err != nil {
		t.Errorf("Err of a lease that is held = %v", err)
	}
	resigned := time.Now()
	if err := first.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-first.Lost()
	if !errors.Is(first.Err(), store.ErrDeposed) {
		t.Errorf("Err after Resign = %v, want ErrDeposed", first.Err())
	}
	l := <-second
	if m := <-next; m.ID != "b" {
		t.Errorf("AwaitLeader = %+v, want b", m)
	}
	if d := time.Since(resigned); d >= store.LeaseTTL {
		t.Errorf("the next one led %v after the first had resigned, want at once", d)
	}
	rung, err := s.client().XRange(t.Context(), "{"+name[len("name="):]+"}:leads", "-", "+").Result()
	if err != nil || len(rung) != 3 || rung[1].Values["lead"] != "" {
		t.Errorf("the bell rang %v, %v, want three times, the second for nobody", rung, err)
	}
	// The one that resigned can neither claim with its lease nor end the other's.
	if err := a.Claim(t.Context(), first); !errors.Is(err, store.ErrDeposed) {
		t.Errorf("Claim with a lease that was resigned = %v, want ErrDeposed", err)
	}
	if err := first.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Claim(t.Context(), l); err != nil {
		t.Errorf("Claim of the leader = %v", err)
	}

	// b dies: its connections are gone, and nothing renews.
	third := campaign(t, c, "c")
	died := time.Now()
	b.Close()
	if l := <-third; l != nil {
		defer l.Resign(context.Background())
	}
	if d := time.Since(died); d > 2*store.LeaseTTL {
		t.Errorf("the next one led %v after the leader had died, want %v", d, store.LeaseTTL)
	}
	if err := a.AwaitNoLeader(soon(t), "b"); err != nil {
		t.Error(err)
	}
}

// TestLeaseIsRenewed for much longer than it lasts, while another waits for it in vain.
func TestLeaseIsRenewed(t *testing.T) {
	s, name := startRedis(t), newName()
	l := <-campaign(t, s.open(name), "a")
	defer l.Resign(context.Background())
	ctx, cancel := context.WithTimeout(t.Context(), 3*store.LeaseTTL/2)
	defer cancel()
	if _, err := s.open(name).Campaign(ctx, store.Member{ID: "b"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Campaign against a leader = %v, want the end of ctx", err)
	}
	if l.Err() != nil {
		t.Errorf("Err = %v", l.Err())
	}
}

// TestLeaseHangs: a leader that cannot reach Redis knows by its own clock that it leads no
// more, before Redis lets another lead.
func TestLeaseHangs(t *testing.T) {
	s, name := startRedis(t), newName()
	var silent atomic.Bool
	p := s.proxied(func([]string) fate {
		if silent.Load() {
			return unheard
		}
		return passes
	})
	r, err := store.OpenRedis(t.Context(), store.RedisOptions{URL: p.url(name)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l := <-campaign(t, r, "a")
	second, led := campaign(t, s.open(name), "b"), make(chan time.Time, 1)
	var other *store.Lease
	go func() { other = <-second; led <- time.Now() }() // ends with soon
	silent.Store(true)
	<-l.Lost()
	known := time.Now()
	if !errors.Is(l.Err(), store.ErrUnavailable) {
		t.Errorf("lost: %v, want ErrUnavailable", l.Err())
	}
	if early := known.Sub(<-led); early > time.Second/2 { // less is this test's own slowness
		t.Errorf("another led %v before the first knew that it did no more", early)
	}
	silent.Store(false)
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	if m, err := r.Leader(t.Context()); m.ID != "b" || err != nil {
		t.Errorf("Leader = %+v, %v, want b", m, err)
	}
	if err := other.Resign(t.Context()); err != nil {
		t.Error(err)
	}

	// Redis itself stands still: nobody leads, and who campaigns leads when it goes on.
	s.signal(syscall.SIGSTOP)
	third := campaign(t, r, "c")
	short, cancel := context.WithTimeout(t.Context(), time.Second/2)
	defer cancel()
	if _, err := r.Leader(short); err == nil {
		t.Error("Leader answered though Redis hangs")
	}
	s.signal(syscall.SIGCONT)
	if l := <-third; l != nil {
		l.Resign(context.Background())
	}
}

func TestDoors(t *testing.T) {
	s, name := startRedis(t), newName()
	r := s.open(name)
	m := store.Member{ID: "x", Addr: "h:1", Key: "ssh-ed25519 AAAA"}
	if err := errors.Join(r.PutDoor(t.Context(), "SHA256:a", m), r.PutDoor(t.Context(), "SHA256:b", m)); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Door(t.Context(), "SHA256:a"); got != m || err != nil {
		t.Errorf("Door = %+v, %v", got, err)
	}
	if all, err := r.Doors(t.Context()); len(all) != 2 || all["SHA256:b"] != m || err != nil {
		t.Errorf("Doors = %+v, %v", all, err)
	}
	key := "{" + name[len("name="):] + "}:door:SHA256:a"
	db := s.client()
	if ttl := db.PTTL(t.Context(), key).Val(); ttl <= 0 || ttl > store.DoorTTL {
		t.Errorf("a door lives %v, want %v", ttl, store.DoorTTL)
	}
	db.PExpire(t.Context(), key, time.Millisecond)
	for db.Exists(t.Context(), key).Val() > 0 {
		pauseABit()
	}
	if all, err := r.Doors(t.Context()); len(all) != 1 || err != nil {
		t.Errorf("Doors after one expired = %+v, %v", all, err)
	}
	if err := r.DropDoor(t.Context(), "SHA256:b"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Door(t.Context(), "SHA256:b"); !errors.Is(err, store.ErrNoMember) {
		t.Errorf("Door after DropDoor = %v, want ErrNoMember", err)
	}
}
