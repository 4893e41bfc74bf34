package janitor

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Whose files go first is a matter of who holds the most, whatever is taken: nobody who has
// lost something holds less, by more than the last of it, than anybody who could have lost
// instead; of one's own the oldest go; and all go before none may.
func TestFirst(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		bytes := rapid.Int64Range(0, 9)
		var all []*share
		of, ids := map[int64]int{}, []int64{} // whose a job is
		for i := range rapid.IntRange(1, 4).Draw(rt, "tenants") {
			all = append(all, &share{bytes: bytes.Draw(rt, "of the last hour")})
			for range rapid.IntRange(0, 5).Draw(rt, "jobs") {
				ids, of[int64(len(of)+1)] = append(ids, int64(len(of)+1)), i
			}
		}
		// Jobs of all come in any order.
		owners := slices.Collect(maps.Values(of))
		slices.Sort(owners)
		for k, i := range rapid.Permutation(owners).Draw(rt, "order") {
			n := bytes.Draw(rt, "bytes")
			of[ids[k]] = i
			all[i].bytes += n
			all[i].jobs = append(all[i].jobs, part{ids[k], n})
		}
		last := make([]int64, len(all)) // id taken last
		for range ids {
			before := make([]share, len(all))
			for i, h := range all {
				before[i] = *h
			}
			id := first(all)
			i, ok := of[id]
			switch {
			case !ok:
				rt.Fatalf("first = %d, want a job", id)
			case id <= last[i]:
				rt.Fatalf("job %d of tenant %d goes after %d, want the oldest first", id, i, last[i])
			case id != before[i].jobs[0].id:
				rt.Fatalf("job %d of tenant %d goes, want %d", id, i, before[i].jobs[0].id)
			case all[i].bytes != before[i].bytes-before[i].jobs[0].bytes:
				rt.Fatalf("tenant %d has %d left of %d, want less by %d", i, all[i].bytes, before[i].bytes, before[i].jobs[0].bytes)
			}
			last[i] = id
			for k := range before {
				if len(before[k].jobs) > 0 && before[k].bytes > before[i].bytes {
					rt.Fatalf("job %d of tenant %d goes, who had %d, and %d had %d", id, i, before[i].bytes, k, before[k].bytes)
				}
			}
		}
		if id := first(all); id != 0 {
			rt.Fatalf("first = %d when all are taken, want 0", id)
		}
	})
}

// Who brings much pushes out their own, however old the files of others are; then it is the
// turn of whoever has the most. A team is one.
func TestTrimFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		complete := func(user, team string, mib int) int64 {
			w.user, w.team = user, team
			defer time.Sleep(time.Minute)
			return w.complete(strings.Repeat(string(rune('a'+len(w.all()))), mib<<20), "")
		}
		bob := complete("bob", "", 3)
		cy := complete("cy", "team", 2)
		di := complete("di", "team", 2)
		ada1, ada2, ada3 := complete("ada", "", 4), complete("ada", "", 4), complete("ada", "", 4)
		time.Sleep(2 * time.Hour)
		complete("bob", "", 6) // of the last hour: it makes bob's older one go, and stays
		gone := func() (ids []int64) {
			for _, rec := range w.all() {
				if !rec.Expired.IsZero() {
					ids = append(ids, rec.ID)
				}
			}
			slices.Sort(ids)
			return ids
		}
		for _, tt := range []struct {
			total int64 // MiB: 25 are used, and a margin is made
			want  []int64
		}{
			{28, nil}, // there is room
			{26, []int64{ada1}},
			{22, []int64{ada1, bob}}, // 9 MiB before, of which 6 stay; ada has 8
			{19, []int64{ada1, bob, ada2}},
			{15, []int64{ada1, bob, ada2, cy}}, // 4 and 4: the older one's
			{11, []int64{ada1, bob, ada2, cy, ada3}},
		} {
			w.disk(tt.total << 20)
			w.clean()
			slices.Sort(tt.want)
			if got := gone(); !slices.Equal(got, tt.want) {
				t.Errorf("on a disk of %d MiB the files of %v are gone, want those of %v (di's %d is kept)", tt.total, got, tt.want, di)
			}
		}
		w.checkClean()
	})
}
