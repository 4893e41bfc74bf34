package queue

import "cmp"

// A key is where something stands in a heap: the smaller goes first. No two in one
// heap are equal, so the order depends on nothing but the keys.
type key struct{ first, then int64 }

func (k key) before(o key) bool {
	return k.first < o.first || k.first == o.first && k.then < o.then
}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.first, o.first), cmp.Compare(k.then, o.then))
}

// A heap finds the item with the smallest key. Keys stand in the heap, side by side:
// with a million jobs a comparison costs nothing, but to fetch what is compared from
// all over the memory does. For the same reason it is wide rather than deep.
type heap[T movable] []seat[T]

// width is how many children a seat has.
const width = 4

type seat[T any] struct {
	key  key
	item T
}

// A movable item is told where in its heap it sits whenever that changes; -1 is
// outside.
type movable interface{ movedTo(i int) }

// push adds x.
func (h *heap[T]) push(k key, x T) {
	*h = append(*h, seat[T]{k, x})
	h.rise(len(*h)-1, seat[T]{k, x})
}

// remove takes out what stands at i.
func (h *heap[T]) remove(i int) {
	old := *h
	last := len(old) - 1
	end := old[last]
	old[i].item.movedTo(-1)
	old[last] = seat[T]{}
	*h = old[:last]
	if i < last {
		h.place(i, end)
	}
}

// move gives what stands at i another key.
func (h heap[T]) move(i int, k key) {
	if h[i].key != k {
		h.place(i, seat[T]{k, h[i].item})
	}
}

// place puts s where it belongs, given that i is free.
func (h heap[T]) place(i int, s seat[T]) {
	if i > 0 && s.key.before(h[(i-1)/width].key) {
		h.rise(i, s)
	} else {
		h.sink(i, s)
	}
}

func (h heap[T]) rise(i int, s seat[T]) {
	for i > 0 {
		up := (i - 1) / width
		if !s.key.before(h[up].key) {
			break
		}
		h.set(i, h[up])
		i = up
	}
	h.set(i, s)
}

func (h heap[T]) sink(i int, s seat[T]) {
	for {
		least, key := i, s.key
		for k := width*i + 1; k < min(width*i+1+width, len(h)); k++ {
			if h[k].key.before(key) {
				least, key = k, h[k].key
			}
		}
		if least == i {
			break
		}
		h.set(i, h[least])
		i = least
	}
	h.set(i, s)
}

func (h heap[T]) set(i int, s seat[T]) {
	h[i] = s
	s.item.movedTo(i)
}
