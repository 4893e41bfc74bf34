package main

import (
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/sshd/store"
)

// TestAssign writes GPUs as letters and slots as words of them.
func TestAssign(t *testing.T) {
	for _, c := range []struct {
		gpus, had string
		per       int
		want      string
		spare     int
	}{
		{"abcd", "- - - -", 1, "a b c d", 0},
		{"abcd", "- -", 2, "ab cd", 0},
		{"abc", "- -", 2, "ab -", 1},
		{"ab", "- - -", 1, "a b -", 0},
		{"", "- -", 1, "- -", 0},
		{"ba", "a b", 1, "a b", 0}, // indices moved
		{"bac", "a - -", 1, "a b c", 0},
		{"bc", "a b", 1, "c b", 0},     // a is gone
		{"abcd", "d -", 2, "da bc", 0}, // one GPU a slot, before
		{"abcd", "ab cd", 1, "a c", 2},
		{"ab", "a a", 1, "a b", 0},   // never twice
		{"abc", "- c", 2, "ab -", 1}, // never half a slot
	} {
		var gpus []gpu.Device
		for _, r := range c.gpus {
			gpus = append(gpus, gpu.Device{UUID: string(r)})
		}
		var had [][]string
		for _, w := range strings.Fields(c.had) {
			had = append(had, strings.Split(strings.Trim(w, "-"), ""))
		}
		owned, spare := assign(gpus, had, c.per)
		var got []string
		for _, ids := range owned {
			w := strings.Join(ids, "")
			if w == "" {
				w = "-"
			}
			got = append(got, w)
		}
		if want := strings.Fields(c.want); !reflect.DeepEqual(got, want) || spare != c.spare {
			t.Errorf("assign(%s, %s, %d) = %v, %d spare, want %v, %d", c.gpus, c.had, c.per, got, spare, want, c.spare)
		}
	}
}

// TestFarewell: a runner that has just begun heeds nothing but SIGTERM, and one that has
// its slot would take a second SIGTERM for an order to give its job back.
func TestFarewell(t *testing.T) {
	sl := slot{dir: t.TempDir()}
	want := func(pid int, sig syscall.Signal) {
		t.Helper()
		if got := sl.farewell(pid); got != sig {
			t.Errorf("process %d is sent %v, want %v", pid, got, sig)
		}
	}
	want(os.Getpid(), syscall.SIGTERM)
	lock, err := store.Lock(sl.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	want(os.Getpid(), goLater)
	want(os.Getpid()+1, syscall.SIGTERM)
}
