package queue

import (
	"cmp"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A guest is an item that knows its key and, as the heap told it, its seat.
type guest struct {
	key  key
	seat int
}

func (g *guest) movedTo(i int) { g.seat = i }

// TestHeap: whatever is pushed, moved and removed, the smallest is first and everybody
// knows their seat.
func TestHeap(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var h heap[*guest]
		var all []*guest
		next := int64(0) // makes keys unique, as ids and turns do
		draw := func() key {
			next++
			return key{rapid.Int64Range(0, 9).Draw(rt, "first"), next}
		}
		for range rapid.IntRange(1, 200).Draw(rt, "steps") {
			what := rapid.IntRange(0, 3).Draw(rt, "what")
			if len(all) == 0 || what < 2 {
				g := &guest{key: draw()}
				all = append(all, g)
				h.push(g.key, g)
			} else {
				i := rapid.IntRange(0, len(all)-1).Draw(rt, "who")
				g := all[i]
				if what == 2 {
					g.key = draw()
					h.move(g.seat, g.key)
				} else {
					h.remove(g.seat)
					all = slices.Delete(all, i, i+1)
					if g.seat != -1 {
						rt.Fatalf("who was removed has seat %d", g.seat)
					}
				}
			}
			verifyHeap(rt, h, all)
		}
	})
}

func verifyHeap(rt *rapid.T, h heap[*guest], all []*guest) {
	if len(h) != len(all) {
		rt.Fatalf("%d in the heap, want %d", len(h), len(all))
	}
	for _, g := range all {
		if h[g.seat].item != g || h[g.seat].key != g.key {
			rt.Fatalf("seat %d is another's, or has another key than %v", g.seat, g.key)
		}
	}
	if len(all) > 0 {
		least := slices.MinFunc(all, func(a, b *guest) int {
			return cmp.Or(cmp.Compare(a.key.first, b.key.first), cmp.Compare(a.key.then, b.key.then))
		})
		if h[0].item != least {
			rt.Fatalf("%v is first, want %v", h[0].key, least.key)
		}
	}
}
