package store_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/storetest"
)

func TestRedis(t *testing.T) {
	s := startRedis(t)
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		name := newName()
		return func() (store.Store, error) {
			r, err := store.OpenRedis(context.Background(), store.RedisOptions{URL: s.url(name)})
			if err != nil {
				return nil, err
			}
			return r, r.Claim(context.Background(), nil)
		}
	})
}

// TestRedisFence: a newer writer ends the older one at once, though their revisions agree,
// and a reader never writes.
func TestRedisFence(t *testing.T) {
	s, name := startRedis(t), newName()
	reader := s.open(name)
	if rev, err := reader.Commit(t.Context(), 0, nil); !errors.Is(err, store.ErrConflict) {
		t.Errorf("Commit of a reader = %d, %v, want ErrConflict", rev, err)
	}
	old := s.writer(name)
	if _, err := old.Commit(t.Context(), 0, numbered(0)); err != nil {
		t.Fatal(err)
	}
	newer := s.writer(name)
	if rev, err := old.Commit(t.Context(), 1, numbered(1)); !errors.Is(err, store.ErrConflict) {
		t.Errorf("Commit of the older writer = %d, %v, want ErrConflict", rev, err)
	}
	if rev, err := newer.Commit(t.Context(), 1, numbered(1)); rev != 2 || err != nil {
		t.Errorf("Commit of the newer writer = %d, %v, want 2", rev, err)
	}
	if v, err := reader.Get(t.Context(), "one", "newest"); string(v) != "1" || err != nil {
		t.Errorf("Get of a reader = %q, %v, want 1", v, err)
	}
	if err := old.Claim(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if rev, err := old.Commit(t.Context(), 2, numbered(2)); rev != 3 || err != nil {
		t.Errorf("Commit after claiming again = %d, %v, want 3", rev, err)
	}
}

// TestRedisSnapshot: whatever is committed while a Load reads its portions, it sees one
// revision. Rows are accounts between which a writer moves money, makes new ones and ends
// old ones: the sum is always the same.
func TestRedisSnapshot(t *testing.T) {
	s, name := startRedis(t, "--appendfsync", "everysec"), newName()
	w, r := s.writer(name), s.open(name)
	const accounts, each = 5000, 100
	sums := make(map[string]int)
	var batch []queue.Write
	put := func(key string, sum int) {
		_, old := sums[key]
		sums[key] = sum
		batch = append(batch, queue.Write{Row: queue.Row{Table: "a" + key[:1], Key: key, Value: fmt.Append(nil, sum)}, New: !old})
	}
	for i := range accounts {
		put(fmt.Sprintf("%d%06d", i%2, i), each)
	}
	rev, err := w.Commit(t.Context(), 0, batch)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(7, 8))
		keys := slices.Sorted(maps.Keys(sums))
		for i := 0; ctx.Err() == nil; i++ {
			batch = batch[:0]
			from, to := rnd.IntN(len(keys)), rnd.IntN(len(keys))
			if from == to {
				continue
			}
			// The account is closed, and a new one has its money and a coin of another's.
			fresh := fmt.Sprintf("%d%06d", rnd.IntN(2), accounts+i)
			gone := keys[from]
			batch = append(batch, queue.Write{Row: queue.Row{Table: "a" + gone[:1], Key: gone}})
			put(fresh, sums[gone]+1)
			put(keys[to], sums[keys[to]]-1)
			delete(sums, gone)
			keys[from] = fresh
			if rev, err = w.Commit(context.Background(), rev, batch); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var last store.Rev
	moved := 0
	for range 20 {
		sum, n := 0, 0
		at, err := r.Load(t.Context(), []string{"a0", "a1"}, func(row queue.Row) error {
			v, err := strconv.Atoi(string(row.Value))
			sum, n = sum+v, n+1
			return err
		})
		if err != nil || n != accounts || sum != accounts*each {
			t.Fatalf("Load at revision %d = %d rows, sum %d, %v, want %d and %d", at, n, sum, err, accounts, accounts*each)
		}
		if at > last {
			moved++
		}
		last = at
	}
	if moved < 10 {
		t.Errorf("the revision moved %d times: the test is not worth much", moved)
	}
}

// TestRedisAwait: who reads hears of a commit, whether it was before or comes after.
func TestRedisAwait(t *testing.T) {
	s, name := startRedis(t), newName()
	w, r := s.writer(name), s.open(name)
	got := make(chan store.Rev)
	go func() { // ends with the second
		rev, _ := r.Await(soon(t), 0)
		got <- rev
		rev, _ = r.Await(soon(t), rev)
		got <- rev
	}()
	for prev := range store.Rev(2) {
		if _, err := w.Commit(t.Context(), prev, nil); err != nil {
			t.Fatal(err)
		}
		if rev := <-got; rev != prev+1 {
			t.Errorf("Await = %d, want %d", rev, prev+1)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Await(ctx, 2); !errors.Is(err, context.Canceled) {
		t.Errorf("Await with a cancelled context = %v", err)
	}
}

// TestRedisURL: what it means, and errors that say what is wrong and never the password.
func TestRedisURL(t *testing.T) {
	for _, url := range []string{
		"redis://localhost", "redis://localhost:6379/1", "redis://[::1]:6379", "rediss://u:p@host/0", "unix:///run/redis.sock?db=2",
		"redis://:p%40ss@h:1/2?durability=always&name=course-1", "redis://a?cluster=true&addr=b:7000&addr=c",
		"redis://a/3?master=m&addr=b&sentinel_user=u&sentinel_password=p", "redis://h?durability=none",
	} {
		if err := store.CheckRedisURL(url); err != nil || !store.IsRedisURL(url) {
			t.Errorf("CheckRedisURL(%q) = %v, IsRedisURL = %v", url, err, store.IsRedisURL(url))
		}
	}
	for _, tt := range []struct{ url, want string }{
		{"http://host", `not "http"`},
		{"redis://", "names no host"},
		{"redis://:1", "names no host"},
		{"redis://u:hunter2/x@host:1", "cannot be read"},
		{"redis://u:hunter2@host:port", "cannot be read"},
		{"redis://u:hunter2@host/one", `the database "one"`},
		{"redis://u:hunter2@host/-1", `the database "-1"`},
		{"redis://host?durability=yes", "auto, always or none"},
		{"redis://host?durable=yes", `"durable"`},
		{"redis://host?name={x}", "letters, digits"},
		{"redis://host?addr=b", "several addresses"},
		{"redis://host?cluster=yes", "true or false"},
		{"redis://host/1?cluster=true", "only the database 0"},
		{"redis://host?cluster=true&master=m", "Sentinels do not watch"},
		{"redis://host?sentinel_user=u", "need master=NAME"},
		{"redis://host?ca=/x", `"ca"`},
		{"rediss://host?ca=/nowhere", "no such file"},
		{"rediss://host?cert=/nowhere", "cert and key"},
		{"unix://host", "names no socket"},
		{"unix:///s?db=x", `the database "x"`},
	} {
		if err := store.CheckRedisURL(tt.url); err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("CheckRedisURL(%q) = %v, want %q", tt.url, err, tt.want)
		}
	}
}

// TestRedisJudge: what is refused, what is warned of.
func TestRedisJudge(t *testing.T) {
	ok := store.RedisFacts{Version: "7.0.15", Mode: "standalone", AOF: true, Fsync: "always", Eviction: "noeviction"}
	for _, tt := range []struct {
		durability string
		change     func(*store.RedisFacts)
		errs, warn string // parts, "" for none
	}{
		{"auto", func(f *store.RedisFacts) {}, "", ""},
		{"auto", func(f *store.RedisFacts) { f.Fsync = "everysec" }, "", "a second or two"},
		{"auto", func(f *store.RedisFacts) { f.Fsync = "no" }, "", "half a minute"},
		{"auto", func(f *store.RedisFacts) { f.Fsync, f.WaitsAOF = "everysec", true }, "", ""},
		{"auto", func(f *store.RedisFacts) { f.AOF = false }, "appendonly is off", ""},
		{"auto", func(f *store.RedisFacts) { f.Eviction = "allkeys-lfu" }, "throw jobs away", ""},
		{"auto", func(f *store.RedisFacts) { f.Eviction = "volatile-ttl" }, "", "forgets who leads"},
		{"auto", func(f *store.RedisFacts) { f.Fsync, f.Hidden = "", []string{"CONFIG"} }, "", "may not run CONFIG"},
		{"auto", func(f *store.RedisFacts) { *f = store.RedisFacts{Hidden: []string{"INFO", "CONFIG"}} }, "", "INFO and CONFIG"},
		{"auto", func(f *store.RedisFacts) { f.Version = "6.2.14" }, "too old", ""},
		{"always", func(f *store.RedisFacts) {}, "", ""},
		{"always", func(f *store.RedisFacts) { f.Fsync = "everysec" }, "not on the disk", ""},
		{"always", func(f *store.RedisFacts) { f.Fsync, f.WaitsAOF = "everysec", true }, "", ""},
		{"always", func(f *store.RedisFacts) { f.Fsync, f.WaitsAOF, f.Mode = "everysec", true, "cluster" }, "not on the disk", ""},
		{"always", func(f *store.RedisFacts) { f.Fsync, f.Hidden = "", []string{"CONFIG"} }, "may not be asked", ""},
		{"none", func(f *store.RedisFacts) { f.AOF, f.Eviction = false, "allkeys-lru" }, "", "appendonly is off"},
		{"none", func(f *store.RedisFacts) { f.Version = "6.2.14" }, "too old", ""},
	} {
		f := ok
		tt.change(&f)
		errs, warnings := f.Judge("redis://h?durability=" + tt.durability)
		for what, c := range map[string]struct {
			got  []error
			want string
		}{"errors": {errs, tt.errs}, "warnings": {warnings, tt.warn}} {
			if text := fmt.Sprint(c.got); (c.want == "") != (len(c.got) == 0) || !strings.Contains(text, c.want) {
				t.Errorf("%s, %+v: %s %s, want %q", tt.durability, f, what, text, c.want)
			}
		}
	}
}

// TestRedisOpen: what real servers are refused for, and warned of.
func TestRedisOpen(t *testing.T) {
	s := startRedis(t, "--appendonly", "no", "--appendfsync", "everysec")
	db := s.client()
	open := func(params ...string) (warnings string, err error) {
		var said []string
		r, err := store.OpenRedis(t.Context(), store.RedisOptions{URL: s.url(params...),
			Logf: func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }})
		if err == nil {
			err = r.Claim(t.Context(), nil)
			r.Close()
		}
		return strings.Join(said, "\n"), err
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "CONFIG SET appendonly yes") {
		t.Errorf("without a file: %v", err)
	}
	if said, err := open("durability=none"); err != nil || !strings.Contains(said, "appendonly is off") {
		t.Errorf("without a file, as asked for: %v, said %q", err, said)
	}
	for _, c := range [][2]string{{"appendonly", "yes"}, {"maxmemory-policy", "allkeys-lru"}} {
		if err := db.ConfigSet(t.Context(), c[0], c[1]).Err(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "maxmemory-policy is allkeys-lru") {
		t.Errorf("with eviction: %v", err)
	}
	db.ConfigSet(t.Context(), "maxmemory-policy", "noeviction")
	if said, err := open(); err != nil || !strings.Contains(said, "loses a second or two") {
		t.Errorf("everysec: %v, said %q", err, said)
	}
	if _, err := open("durability=always"); err == nil || !strings.Contains(err.Error(), "appendfsync always") {
		t.Errorf("everysec, though always was asked for: %v", err)
	}
	if _, err := open("db=99"); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "DB index") {
		t.Errorf("database 99: %v", err)
	}
	s.kill()
	if _, err := open(); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("no server: %v, want ErrUnavailable", err)
	}
}

// leastACL is what a user of Redis has to be allowed, as SECURITY.md says.
const leastACL = "~{acl}:* resetchannels -@all +ping +hello +auth +select +client|setname +eval +evalsha +get +set +del +exists +pexpire +pttl " +
	"+hget +hset +hsetnx +hmget +hdel +hincrby +zadd +zrem +zrange +xadd +xrange +xrevrange +xread +sadd +srem +smembers +multi +exec"

// TestRedisACL: a user who may do the least works; one who lacks a command of a commit is
// told before anything is written; a wrong password is no riddle.
func TestRedisACL(t *testing.T) {
	s := startRedis(t)
	db := s.client()
	user := func(name, rules string) {
		if err := db.Do(t.Context(), append([]any{"ACL", "SETUSER", name, "reset", "on", ">pw"}, words(rules)...)...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	user("least", leastACL)
	user("lacks", leastACL+" -zrem")
	url := func(account string) string {
		return strings.Replace(s.url("name=acl"), "unix://", "unix://"+account+"@", 1)
	}
	var said []string
	r, err := store.OpenRedis(t.Context(), store.RedisOptions{URL: url("least:pw"),
		Logf: func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(said) != 1 || !strings.Contains(said[0], "INFO and CONFIG") {
		t.Errorf("said %q, want that INFO and CONFIG may not be asked", said)
	}
	lease, err := r.Campaign(soon(t), store.Member{ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Claim(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	a := &account{t: t, Redis: r}
	for range 3 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	rows := numbered(1)
	rows[1].New = false
	if _, err := r.Commit(t.Context(), a.rev, append(rows, queue.Write{Row: queue.Row{Table: "many", Key: "000000002"}})); err != nil {
		t.Error(err)
	}
	if rows, err := r.List(t.Context(), "all", 0, 9); len(rows) != 2 || err != nil {
		t.Errorf("List = %d rows, %v, want 2", len(rows), err)
	}
	if err := errors.Join(r.PutDoor(t.Context(), "f", store.Member{}), r.DropDoor(t.Context(), "f"), lease.Resign(t.Context())); err != nil {
		t.Error(err)
	}
	if _, err := r.Doors(t.Context()); err != nil {
		t.Error(err)
	}

	lacks, err := store.OpenRedis(t.Context(), store.RedisOptions{URL: url("lacks:pw")})
	if err != nil {
		t.Fatal(err)
	}
	defer lacks.Close()
	if err := lacks.Claim(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "can't run this command") {
		t.Errorf("Claim without ZREM = %v, want that", err)
	}
	_, err = store.OpenRedis(t.Context(), store.RedisOptions{URL: url("least:wrong")})
	if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("OpenRedis with a wrong password = %v, want ErrUnavailable, WRONGPASS", err)
	}
}

func words(text string) (all []any) {
	for w := range strings.FieldsSeq(text) {
		all = append(all, w)
	}
	return all
}

// TestRedisWaits: where Redis can, a commit waits for the disk though appendfsync is
// everysec, on the connection that wrote; when the disk does not follow it is not done.
func TestRedisWaits(t *testing.T) {
	s, name := startRedis(t, "--appendfsync", "everysec"), newName()
	var waits atomic.Int64
	var dead atomic.Bool
	p := s.proxied(func(words []string) fate {
		if !strings.EqualFold(words[0], "WAITAOF") {
			return passes
		}
		if words[1] == "1" {
			waits.Add(1)
		}
		if dead.Load() {
			return unheard
		}
		return fakes
	})
	r := openURL(t, p.url(name))
	if !r.Facts().WaitsAOF {
		t.Fatalf("facts %+v: want WAITAOF", r.Facts())
	}
	before := waits.Load()
	if rev, err := r.Commit(t.Context(), 0, numbered(0)); rev != 1 || err != nil {
		t.Fatalf("Commit = %d, %v", rev, err)
	}
	if n := waits.Load() - before; n < 1 {
		t.Error("the commit did not wait")
	}
	dead.Store(true)
	if rev, err := r.Commit(t.Context(), 1, numbered(1)); !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Commit that is not on the disk = %d, %v, want ErrAmbiguous", rev, err)
	}
	dead.Store(false)
	if rev, err := r.Load(t.Context(), nil, nil); rev != 2 || err != nil {
		t.Errorf("Load = %d, %v, want 2", rev, err)
	}
}
