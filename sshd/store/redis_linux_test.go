package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// TestRedisDiskFull: a Redis whose disk is full takes nothing (appendfsync everysec), or
// ends (always). Nothing is lost, and it goes on when there is room.
func TestRedisDiskFull(t *testing.T) {
	disk := smallDisk(t, 8<<20)
	s := startRedis(t, "--dir", disk, "--appendfsync", "everysec")
	a := &account{t: t, Redis: s.writer(newName())}
	if err := a.commit(); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 8<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	var err error
	for range 200 { // Redis finds out by itself
		batch := append(numbered(a.next), queue.Write{Row: queue.Row{Table: "ballast", Key: "b", Value: make([]byte, 100<<10)}})
		rev, cerr := a.Commit(t.Context(), a.rev, batch)
		if err = cerr; err != nil {
			break
		}
		a.rev, a.next, a.told = rev, a.next+1, a.told+1
	}
	if !errors.Is(err, store.ErrUnavailable) || !contains(err, "MISCONF") {
		t.Errorf("Commit to a full disk = %v, want ErrUnavailable, MISCONF", err)
	}
	a.reload(false)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for err = a.commit(); errors.Is(err, store.ErrUnavailable); err = a.commit() {
		pauseABit()
	}
	if err != nil {
		t.Fatal(err)
	}
}
