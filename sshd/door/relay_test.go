package door

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
)

// throughAnother makes open put another door in front of the house.
var throughAnother bool

// TestThroughAnotherDoor runs what clients may rely on once more, for clients whose
// sessions are handled by another raid than the one that they have called.
func TestThroughAnotherDoor(t *testing.T) {
	throughAnother = true
	defer func() { throughAnother = false }()
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Session", TestSession}, {"Shell", TestShell}, {"FrameOrder", TestFrameOrder}, {"StdinNotWaitedFor", TestStdinNotWaitedFor},
		{"PTY", TestPTY}, {"Signals", TestSignals}, {"WriteAfterEnd", TestWriteAfterEnd}, {"ClosedOutput", TestClosedOutput},
		{"Causes", TestCauses}, {"Requests", TestRequests}, {"OneCommand", TestOneCommand}, {"EnvFlood", TestEnvFlood},
		{"Panic", TestPanic}, {"SessionContext", TestSessionContext}, {"FloodsNobodyReads", TestFloodsNobodyReads},
		{"StatusWhenCancelled", TestStatusWhenCancelled}, {"StoppedReader", TestStoppedReader},
		{"GuestsWithSSH", TestGuestsWithSSH}, {"RefusedWithSSH", TestRefusedWithSSH}, {"CausesWithSSH", TestCausesWithSSH},
		{"BulkWithSSH", TestBulkWithSSH}, {"ExtrasWithSSH", TestExtrasWithSSH},
	} {
		t.Run(test.name, test.run)
	}
}

// openTwo starts a house whose clients come through another door.
func openTwo(t testing.TB, cfg Config) *house {
	t.Helper()
	own := dialtest.Signer(t)
	cfg.HostKeys = []ssh.Signer{dialtest.Signer(t)}
	var h *house
	asked := cfg.Authorize
	cfg.Authorize = func(ctx context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
		switch {
		case bytes.Equal(key.Marshal(), own.PublicKey().Marshal()):
			return keys.Identity{User: "other", Role: keys.Door}, nil
		case asked != nil:
			return asked(ctx, key, from)
		}
		return h.enrolled(ctx, key, from)
	}
	h = build(t, cfg)
	h.listen(t)
	link, err := Dial(t.Context(), h.addr, own, cfg.HostKeys[0].PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := link.Close(); err != nil {
			t.Errorf("close the link: %v", err)
		}
	})
	front := build(t, Config{
		HostKeys: cfg.HostKeys,
		Route:    func(context.Context) *Link { return link },
		Authorize: func(_ context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
			return link.Who(key, from)
		},
		Handle: func(context.Context, *Session) int { t.Error("handled at the wrong raid"); return 99 },
	})
	front.listen(t)
	h.front, h.addr = front, front.addr
	return h
}

// A student cannot pass for a raid, nor a raid for a student.
func TestOnlyDoorsCarry(t *testing.T) {
	h := open(t, Config{})
	c := h.dial(t, h.ada)
	extra := ssh.Marshal(struct{ S string }{"x"})
	if _, _, err := c.OpenChannel(carriedChannel, extra); err == nil {
		t.Error("a student may bring sessions of others")
	}
	if ok, _, err := c.SendRequest(whoRequest, true, []byte(`{"key":""}`)); ok || err != nil {
		t.Errorf("a student may ask who a key belongs to: %v, %v", ok, err)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := s.SendRequest(leftRequest, true, []byte("left")); ok || err != nil {
		t.Errorf("a student may say why somebody left: %v, %v", ok, err)
	}
}

// TestNoWaitOnTheLink: whether a stranger is another raid may take long to find out. Only
// those who log in here wait for it; through a link strangers are answered at once.
func TestNoWaitOnTheLink(t *testing.T) {
	own, raid := dialtest.Signer(t), dialtest.Signer(t)
	cfg := Config{HostKeys: []ssh.Signer{dialtest.Signer(t)}, Handle: func(context.Context, *Session) int { return 0 }}
	cfg.Authorize = func(context.Context, ssh.PublicKey, netip.AddrPort) (keys.Identity, error) {
		return keys.Identity{Role: keys.Guest}, nil
	}
	cfg.IsRaid = func(ctx context.Context, key ssh.PublicKey) bool {
		if bytes.Equal(key.Marshal(), own.PublicKey().Marshal()) {
			return true
		}
		<-ctx.Done()
		return false
	}
	h := build(t, cfg)
	h.listen(t)
	link, err := Dial(t.Context(), h.addr, own, cfg.HostKeys[0].PublicKey())
	if err != nil {
		t.Fatalf("a raid that IsRaid knows: %v", err)
	}
	defer link.Close()
	late := time.AfterFunc(time.Minute, func() { link.Close() })
	defer late.Stop()
	for range 5 {
		if who, err := link.Who(raid.PublicKey(), netip.AddrPort{}); err != nil || who.Role != keys.Guest {
			t.Fatalf("Who of a stranger = %+v, %v, want a guest", who, err)
		}
	}
}
