package main

import (
	"reflect"
	"strings"
	"testing"

	"github.com/rai-project/raid/runner/gpu"
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
