// Package storetest holds every backend of package store to what Store promises.
//
// A backend's test is three lines: storetest.Run with a function that makes a
// fresh place and returns how to open a store there. Run opens a place again after
// a Close and expects everything to be as it was. What only a crash shows (kill -9,
// a full disk) is the backend's own test.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// A Place returns how to open, again and again, one store that starts empty. It may
// use t.TempDir and t.Cleanup; Run closes what it opens.
type Place func(t *testing.T) (open func() (store.Store, error))

// Run tests the stores of place.
func Run(t *testing.T, place Place) {
	tests := []struct {
		name string
		run  func(*testing.T, *bench)
	}{
		{"Empty", testEmpty},
		{"Rows", testRows},
		{"LoadOrder", testLoadOrder},
		{"LoadStops", testLoadStops},
		{"Conflict", testConflict},
		{"BatchInOrder", testBatchInOrder},
		{"ListOrder", testListOrder},
		{"ListBounds", testListBounds},
		{"Ascend", testAscend},
		{"ListMembership", testListMembership},
		{"Binary", testBinary},
		{"Large", testLarge},
		{"KeepsNothing", testKeepsNothing},
		{"Cancelled", testCancelled},
		{"Closed", testClosed},
		{"Concurrent", testConcurrent},
		{"Random", testRandom},
		{"Trace", testTrace},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, newBench(t, place)) })
	}
}

// A bench is one store under test. When the test ends, it reopens the store and
// checks that nothing it can read has changed: every test tests durability.
type bench struct {
	store.Store
	t      *testing.T
	open   func() (store.Store, error)
	rev    store.Rev
	tables []string // that were written to
	lists  []string
}

func newBench(t *testing.T, place Place) *bench {
	b := &bench{t: t, open: place(t)}
	b.reopen()
	t.Cleanup(func() {
		if !t.Failed() {
			before := b.dump()
			b.reopen()
			if after := b.dump(); after != before {
				t.Errorf("after reopening: %s\nbefore: %s", after, before)
			}
		}
		if err := b.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return b
}

func (b *bench) reopen() {
	b.t.Helper()
	if b.Store != nil {
		if err := b.Close(); err != nil {
			b.t.Fatalf("Close() = %v", err)
		}
	}
	s, err := b.open()
	if err != nil {
		b.t.Fatalf("open: %v", err)
	}
	b.Store = s
}

// commit applies writes to the newest revision.
func (b *bench) commit(writes ...queue.Write) {
	b.t.Helper()
	b.note(writes)
	rev, err := b.Commit(b.t.Context(), b.rev, writes)
	if err != nil || rev != b.rev+1 {
		b.t.Fatalf("Commit(%d, %d writes) = %d, %v, want %d", b.rev, len(writes), rev, err, b.rev+1)
	}
	b.rev = rev
}

func (b *bench) note(writes []queue.Write) {
	for _, w := range writes {
		if !slices.Contains(b.tables, w.Table) {
			b.tables = append(b.tables, w.Table)
		}
		for _, l := range w.Lists {
			if !slices.Contains(b.lists, l) {
				b.lists = append(b.lists, l)
			}
		}
	}
}

func (b *bench) load(tables ...string) string {
	b.t.Helper()
	var rows []queue.Row
	rev, err := b.Load(context.Background(), tables, func(r queue.Row) error {
		rows = append(rows, r)
		return nil
	})
	if err != nil || rev != b.rev {
		b.t.Errorf("Load(%q) = %d, %v, want revision %d", tables, rev, err, b.rev)
	}
	return show(rows)
}

func (b *bench) list(name string, before int64, n int) string {
	b.t.Helper()
	rows, err := b.List(context.Background(), name, before, n)
	if err != nil {
		b.t.Errorf("List(%q, %d, %d) = %v", name, before, n, err)
	}
	return show(rows)
}

func (b *bench) ascend(name string, after int64, n int) string {
	b.t.Helper()
	rows, err := b.Ascend(context.Background(), name, after, n)
	if err != nil {
		b.t.Errorf("Ascend(%q, %d, %d) = %v", name, after, n, err)
	}
	return show(rows)
}

// dump shows all there is to read.
func (b *bench) dump() string {
	b.t.Helper()
	text := fmt.Sprintf("rows %s", b.load(b.tables...))
	for _, l := range b.lists {
		text += fmt.Sprintf("\nlist %q %s", l, b.list(l, 0, math.MaxInt32))
	}
	return text
}

// show writes rows as table/key=value.
func show(rows []queue.Row) string {
	var parts []string
	for _, r := range rows {
		v := fmt.Sprintf("%q", r.Value)
		if r.Value == nil {
			v = "nil"
		} else if len(r.Value) > 100 {
			v = fmt.Sprintf("%d bytes", len(r.Value))
		}
		parts = append(parts, fmt.Sprintf("%q/%q=%s", r.Table, r.Key, v))
	}
	return strings.Join(parts, " ")
}

// put and del make writes; listed puts one into lists.
func put(table, key, value string) queue.Write {
	return queue.Write{Row: queue.Row{Table: table, Key: key, Value: []byte(value)}}
}

func del(table, key string) queue.Write {
	return queue.Write{Row: queue.Row{Table: table, Key: key}}
}

func listed(w queue.Write, score int64, lists ...string) queue.Write {
	w.Lists, w.Score = lists, score
	return w
}

// equal reports a difference of what was read.
func equal(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s = %s, want %s", what, got, want)
	}
}

func testEmpty(t *testing.T, b *bench) {
	equal(t, "Load of a new store", b.load("t", "u"), "")
	equal(t, "Load of no table", b.load(), "")
	equal(t, "List of a new store", b.list("l", 0, 10), "")
	if v, err := b.Get(t.Context(), "t", "k"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get in a new store = %q, %v, want ErrNotFound", v, err)
	}
	b.commit()
	b.commit(del("t", "never was"))
	equal(t, "Load after an empty batch", b.load("t"), "")
}

func testRows(t *testing.T, b *bench) {
	b.commit(put("t", "a", "1"), put("t", "b", ""), put("u", "a", "2"))
	equal(t, "Load", b.load("t", "u"), `"t"/"a"="1" "t"/"b"="" "u"/"a"="2"`)
	if v, err := b.Get(t.Context(), "t", "b"); err != nil || v == nil || len(v) != 0 {
		t.Errorf("Get of an empty value = %#v, %v, want []byte{}", v, err)
	}
	b.commit(put("t", "a", "3"), del("u", "a"))
	equal(t, "Load", b.load("t", "u"), `"t"/"a"="3" "t"/"b"=""`)
	if v, err := b.Get(t.Context(), "t", "a"); err != nil || string(v) != "3" {
		t.Errorf("Get(t, a) = %q, %v, want 3", v, err)
	}
	if v, err := b.Get(t.Context(), "u", "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get of a deleted row = %q, %v, want ErrNotFound", v, err)
	}
}

func testLoadOrder(t *testing.T, b *bench) {
	b.commit(put("t", "b", ""), put("t", "10", ""), put("t", "9", ""), put("t", "ba", ""), put("t", "B", ""),
		put("t", "\xff", ""), put("t", "é", ""), put("t", "", ""), put("s", "x", ""))
	equal(t, "Load(t, s)", b.load("t", "s"),
		`"t"/""="" "t"/"10"="" "t"/"9"="" "t"/"B"="" "t"/"b"="" "t"/"ba"="" "t"/"é"="" "t"/"\xff"="" "s"/"x"=""`)
}

func testLoadStops(t *testing.T, b *bench) {
	b.commit(put("t", "a", ""), put("t", "b", ""))
	stop, calls := errors.New("enough"), 0
	_, err := b.Load(t.Context(), []string{"t"}, func(queue.Row) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("Load whose fn fails = %v after %d calls, want %v after 1", err, calls, stop)
	}
}

func testConflict(t *testing.T, b *bench) {
	b.commit(put("t", "a", "1"))
	for _, prev := range []store.Rev{0, 2, math.MaxInt64} {
		rev, err := b.Commit(t.Context(), prev, []queue.Write{put("t", "a", "2"), listed(put("t", "b", ""), 1, "l")})
		if !errors.Is(err, store.ErrConflict) {
			t.Errorf("Commit(%d) at revision 1 = %d, %v, want ErrConflict", prev, rev, err)
		}
	}
	equal(t, "Load after conflicts", b.load("t"), `"t"/"a"="1"`)
	equal(t, "List after conflicts", b.list("l", 0, 9), "")
	b.commit(put("t", "a", "3"))
}

func testBatchInOrder(t *testing.T, b *bench) {
	b.commit(put("t", "a", "1"), del("t", "a"), put("t", "b", "1"), put("t", "b", "2"), del("t", "c"), put("t", "c", "3"),
		listed(put("t", "d", "1"), 1, "l"), listed(put("t", "d", "2"), 2, "m"),
		listed(put("t", "e", "1"), 1, "l"), del("t", "e"))
	equal(t, "Load", b.load("t"), `"t"/"b"="2" "t"/"c"="3" "t"/"d"="2"`)
	equal(t, "List(l)", b.list("l", 0, 9), "")
	equal(t, "List(m)", b.list("m", 0, 9), `"t"/"d"="2"`)
}

func testListOrder(t *testing.T, b *bench) {
	for i, s := range []int64{5, -1, math.MaxInt64, 0, math.MinInt64, 1 << 53, 1<<53 + 1} {
		b.commit(listed(put("t", fmt.Sprint(i), ""), s, "l", fmt.Sprint("only", i)))
	}
	b.commit(listed(put("t", "7", ""), 5, "l"), listed(put("s", "9", ""), 5, "l"))
	equal(t, "List", b.list("l", 0, 99),
		`"t"/"2"="" "t"/"6"="" "t"/"5"="" "t"/"7"="" "t"/"0"="" "s"/"9"="" "t"/"3"="" "t"/"1"="" "t"/"4"=""`)
	equal(t, "List of one", b.list("only3", 0, 99), `"t"/"3"=""`)
}

func testListBounds(t *testing.T, b *bench) {
	for s := range int64(5) {
		b.commit(listed(put("t", fmt.Sprint(s-1), ""), s-1, "l"))
	}
	tests := []struct {
		before int64
		n      int
		want   string
	}{
		{0, 2, `"t"/"3"="" "t"/"2"=""`},
		{2, 2, `"t"/"1"="" "t"/"0"=""`},
		{2, 99, `"t"/"1"="" "t"/"0"="" "t"/"-1"=""`},
		{-1, 99, ""},
		{math.MinInt64, 99, ""},
		{math.MaxInt64, 1, `"t"/"3"=""`},
		{0, 0, ""},
		{0, -1, ""},
	}
	for _, tt := range tests {
		equal(t, fmt.Sprintf("List(l, %d, %d)", tt.before, tt.n), b.list("l", tt.before, tt.n), tt.want)
	}
}

func testAscend(t *testing.T, b *bench) {
	for s := range int64(5) {
		b.commit(listed(put("t", fmt.Sprint(s-1), ""), s-1, "l", fmt.Sprint("only", s-1)))
	}
	b.commit(listed(put("u", "2", ""), 2, "l"), listed(put("t", "12", ""), 2, "l"), listed(put("t", "max", ""), math.MaxInt64, "l"))
	tests := []struct {
		after int64
		n     int
		want  string
	}{
		{math.MinInt64, 2, `"t"/"-1"="" "t"/"0"=""`},
		{-1, 2, `"t"/"0"="" "t"/"1"=""`},
		{0, 1, `"t"/"1"=""`}, // 0 is a bound like any other
		{1, 99, `"t"/"12"="" "t"/"2"="" "u"/"2"="" "t"/"3"="" "t"/"max"=""`},
		{3, 99, `"t"/"max"=""`},
		{math.MaxInt64, 99, ""},
		{-9, 0, ""},
		{-9, -1, ""},
	}
	for _, tt := range tests {
		equal(t, fmt.Sprintf("Ascend(l, %d, %d)", tt.after, tt.n), b.ascend("l", tt.after, tt.n), tt.want)
	}
	equal(t, "Ascend of another list", b.ascend("only3", 0, 99), `"t"/"3"=""`)
	b.commit(del("t", "2"))
	equal(t, "Ascend after a delete", b.ascend("l", 1, 2), `"t"/"12"="" "u"/"2"=""`)
}

func testListMembership(t *testing.T, b *bench) {
	b.commit(listed(put("t", "a", "1"), 1, "l", "m"), listed(put("t", "b", "1"), 2, "l", "l"))
	equal(t, "List(l)", b.list("l", 0, 9), `"t"/"b"="1" "t"/"a"="1"`)
	b.commit(listed(put("t", "a", "2"), 3, "m", "n"))
	equal(t, "List(l) after a left", b.list("l", 0, 9), `"t"/"b"="1"`)
	equal(t, "List(m) after a stayed", b.list("m", 0, 9), `"t"/"a"="2"`)
	equal(t, "List(m, 3) after a rose", b.list("m", 3, 9), "")
	equal(t, "List(n) after a came", b.list("n", 0, 9), `"t"/"a"="2"`)
	b.commit(put("t", "a", "3"))
	equal(t, "List(m) of none named", b.list("m", 0, 9), "")
	w := del("t", "b")
	w.Lists = []string{"n"}
	b.commit(w)
	equal(t, "List(l) after a delete", b.list("l", 0, 9), "")
	equal(t, "List(n) named in a delete", b.list("n", 0, 9), "")
	b.commit(put("t", "b", "again"))
	equal(t, "List(l) after the row came back", b.list("l", 0, 9), "")
}

func testBinary(t *testing.T, b *bench) {
	odd := []string{"\x00", "a\x00b", "a\x00c", "\xff\xfe", "'; DROP TABLE row; --", "%00", "\n", "☃", ""}
	for _, s := range odd {
		b.commit(listed(put(s, s, s), 1, s), put("t", s, s))
	}
	for _, s := range odd {
		equal(t, fmt.Sprintf("Load(%q)", s), b.load(s), fmt.Sprintf("%q/%q=%q", s, s, s))
		equal(t, fmt.Sprintf("List(%q)", s), b.list(s, 0, 9), fmt.Sprintf("%q/%q=%q", s, s, s))
		if v, err := b.Get(t.Context(), "t", s); err != nil || string(v) != s {
			t.Errorf("Get(t, %q) = %q, %v", s, v, err)
		}
	}
}

func testLarge(t *testing.T, b *bench) {
	big := make([]byte, 4<<20)
	for i := range big {
		big[i] = byte(i * i >> 8)
	}
	key := strings.Repeat("k", 10_000)
	b.commit(put("t", key, string(big)))
	if v, err := b.Get(t.Context(), "t", key); err != nil || !bytes.Equal(v, big) {
		t.Errorf("Get of 4 MiB = %d bytes, %v, want what was put", len(v), err)
	}
	var many []queue.Write
	for i := range 5000 {
		many = append(many, listed(put("u", fmt.Sprintf("%05d", i), "x"), int64(i), "l"))
	}
	b.commit(many...)
	if rows, err := b.List(t.Context(), "l", 0, 9999); err != nil || len(rows) != 5000 {
		t.Errorf("List after a batch of 5000 = %d rows, %v", len(rows), err)
	}
}

// testKeepsNothing: whoever gave bytes or got them may change them.
func testKeepsNothing(t *testing.T, b *bench) {
	v, lists := []byte("good"), []string{"l"}
	b.commit(queue.Write{Row: queue.Row{Table: "t", Key: "a", Value: v}, Lists: lists, Score: 1})
	v[0], lists[0] = 'X', "m"
	got, err := b.Get(t.Context(), "t", "a")
	if err != nil || string(got) != "good" {
		t.Errorf("Get after its value was changed outside = %q, %v, want good", got, err)
	}
	got[0] = 'X'
	rows, err := b.List(t.Context(), "l", 0, 1)
	if err != nil || show(rows) != `"t"/"a"="good"` {
		t.Fatalf("List = %s, %v", show(rows), err)
	}
	rows[0].Value[0] = 'X'
	equal(t, "Load", b.load("t"), `"t"/"a"="good"`)
}

func testCancelled(t *testing.T, b *bench) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if rev, err := b.Commit(ctx, 0, []queue.Write{put("t", "a", "")}); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit with a cancelled context = %d, %v, want context.Canceled", rev, err)
	}
	if _, err := b.Get(ctx, "t", "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get with a cancelled context = %v, want context.Canceled", err)
	}
	equal(t, "Load", b.load("t"), "")
	b.commit(put("t", "a", ""))
}

func testClosed(t *testing.T, b *bench) {
	b.commit(put("t", "a", ""))
	for range 2 {
		if err := b.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	_, load := b.Load(t.Context(), []string{"t"}, func(queue.Row) error { return nil })
	_, commit := b.Commit(t.Context(), b.rev, nil)
	_, get := b.Get(t.Context(), "t", "a")
	_, list := b.List(t.Context(), "l", 0, 1)
	_, ascend := b.Ascend(t.Context(), "l", 0, 1)
	for name, err := range map[string]error{"Load": load, "Commit": commit, "Get": get, "List": list, "Ascend": ascend} {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", name, err)
		}
	}
	b.reopen()
}

// testConcurrent reads while batches are committed, each of which writes one number
// to two rows and a list: no reader may ever see two numbers.
func testConcurrent(t *testing.T, b *bench) {
	const commits, readers = 100, 8
	pair := func(i int) []queue.Write {
		v := fmt.Sprint(i)
		return []queue.Write{listed(put("t", "a", v), int64(i), "l"), listed(put("u", "b", v), int64(i), "l")}
	}
	b.commit(pair(0)...)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for {
				if err := readPair(b); err != nil {
					t.Error(err)
					return
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for i := range commits {
		b.commit(pair(i + 1)...)
	}
	close(done)
	wg.Wait()
}

func readPair(b *bench) error {
	ctx := context.Background()
	var loaded []queue.Row
	if _, err := b.Load(ctx, []string{"t", "u"}, func(r queue.Row) error { loaded = append(loaded, r); return nil }); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	found, err := b.List(ctx, "l", 0, 9)
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	for what, rows := range map[string][]queue.Row{"Load": loaded, "List": found} {
		if len(rows) != 2 || !bytes.Equal(rows[0].Value, rows[1].Value) {
			return fmt.Errorf("%s while committing = %s, want two rows of one value", what, show(rows))
		}
	}
	if _, err := b.Get(ctx, "t", "a"); err != nil {
		return fmt.Errorf("get: %w", err)
	}
	return nil
}

// testRandom compares the store with the simplest one that could be right.
func testRandom(t *testing.T, b *bench) {
	rnd := rand.New(rand.NewPCG(1, 2))
	model := map[[2]string]queue.Write{}
	for range 60 {
		var batch []queue.Write
		for range rnd.IntN(20) {
			w := randomWrite(rnd)
			_, had := model[[2]string{w.Table, w.Key}]
			w.New = !had && w.Value != nil && rnd.IntN(4) > 0
			batch = append(batch, w)
			if w.Value == nil {
				delete(model, [2]string{w.Table, w.Key})
			} else {
				model[[2]string{w.Table, w.Key}] = w
			}
		}
		b.commit(batch...)
		for _, table := range []string{"t", "u"} {
			equal(t, "Load "+table, b.load(table), show(modelLoad(model, table)))
		}
		for _, l := range []string{"l", "m", "n"} {
			before, n := rnd.Int64N(7)-3, rnd.IntN(9)
			equal(t, fmt.Sprintf("List(%s, %d, %d)", l, before, n), b.list(l, before, n), show(modelList(model, l, before, n)))
			equal(t, fmt.Sprintf("Ascend(%s, %d, %d)", l, before, n), b.ascend(l, before, n), show(modelAscend(model, l, before, n)))
		}
		if t.Failed() {
			t.Fatalf("the batch was %+v", batch)
		}
	}
}

func randomWrite(rnd *rand.Rand) queue.Write {
	w := del([]string{"t", "u"}[rnd.IntN(2)], fmt.Sprint(rnd.IntN(12)))
	if rnd.IntN(4) == 0 {
		return w
	}
	w.Value = fmt.Append([]byte{}, rnd.IntN(1000))
	w.Score = rnd.Int64N(7) - 3
	for _, l := range []string{"l", "m", "n"} {
		if rnd.IntN(2) == 0 {
			w.Lists = append(w.Lists, l)
		}
	}
	return w
}

func modelLoad(model map[[2]string]queue.Write, table string) (rows []queue.Row) {
	for _, id := range slices.SortedFunc(maps.Keys(model), compareIDs) {
		if id[0] == table {
			rows = append(rows, model[id].Row)
		}
	}
	return rows
}

func modelList(model map[[2]string]queue.Write, list string, before int64, n int) (rows []queue.Row) {
	ids := slices.SortedFunc(maps.Keys(model), func(a, b [2]string) int {
		if s, r := model[a].Score, model[b].Score; s != r {
			return -compareInts(s, r)
		}
		return -compareIDs(a, b)
	})
	for _, id := range ids {
		w := model[id]
		if slices.Contains(w.Lists, list) && (before == 0 || w.Score < before) && len(rows) < n {
			rows = append(rows, w.Row)
		}
	}
	return rows
}

func modelAscend(model map[[2]string]queue.Write, list string, after int64, n int) (rows []queue.Row) {
	all := modelList(model, list, 0, math.MaxInt)
	slices.Reverse(all)
	for _, r := range all {
		if model[[2]string{r.Table, r.Key}].Score > after && len(rows) < n {
			rows = append(rows, r)
		}
	}
	return rows
}

func compareIDs(a, b [2]string) int {
	if c := strings.Compare(a[0], b[0]); c != 0 {
		return c
	}
	return strings.Compare(a[1], b[1])
}

func compareInts(a, b int64) int {
	if a < b {
		return -1
	}
	return 1
}
