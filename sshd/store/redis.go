package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/sshd/queue"
)

// RedisOptions say which Redis, and what is heard of it.
type RedisOptions struct {
	// URL is one of
	//
	//	redis://[[user]:password@]host[:6379][/db]             one server
	//	unix://[[user]:password@]/path/to/socket[?db=N]        one server of this machine
	//	redis://host:26379/db?master=NAME&addr=host2:26379     the one that Sentinels name NAME
	//	redis://host:7000?cluster=true&addr=host2:7000         a cluster; everything is in one slot
	//
	// rediss instead of redis speaks TLS, with ca=FILE, cert=FILE and key=FILE for
	// certificates that the machine does not know. The other parameters are
	//
	//	durability=auto    Redis must append every write to its file and evict no rows (the default)
	//	durability=always  and a commit must be on its disk before it is acknowledged
	//	durability=none    anything goes: for trying things out, and for tests
	//	name=rai           the word in braces before every key: one for each deployment
	//	sentinel_user, sentinel_password
	URL string
	// Logf, which may be nil, hears warnings: what Redis could do better.
	Logf func(format string, args ...any)
}

// A Redis is a deployment that lives in Redis: its rows, which are a [Store], who leads
// it, and where its doors are. Its methods are safe for concurrent use, as those of a
// Store are.
//
// It is opened to read. Whoever is to write calls Claim first, once, and then Load: from
// that moment every other writer's commits fail with ErrConflict, whatever revision they
// name, and so do this one's once somebody else has claimed.
//
// Opening it silences go-redis's own log for the whole process.
type Redis struct {
	client redis.UniversalClient
	space  keyspace
	facts  RedisFacts
	waits  bool // a commit waits for the disk with WAITAOF
	closed atomic.Bool
	open   atomic.Pointer[sending] // its outcome is unknown; set under mu

	mu     sync.Mutex      // protects the following; held for a whole commit
	epoch  string          // of the claim; "" for none
	turn   int64           // see settle.lua
	nonces int64           // drawn
	listed map[string]bool // tables of which rows may stand in lists; nothing: not asked yet
}

var _ Store = (*Redis)(nil)

// OpenRedis opens a deployment. It refuses a Redis that cannot keep what durability
// promises, and one older than 7.0. ctx bounds it; Redis may well be away: that is
// ErrUnavailable.
func OpenRedis(ctx context.Context, o RedisOptions) (*Redis, error) {
	p, err := parseRedisURL(o.URL)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	r := &Redis{client: p.dial(), space: keyspace("{" + p.name + "}:")}
	if r.facts, err = examine(ctx, r.client, r.space); err == nil {
		err = r.judge(p.durability, o.Logf)
	} else if refused(err) || !errors.As(err, new(redis.Error)) {
		err = r.failed(ctx, err)
	}
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("open store: %w", err)
	}
	return r, nil
}

// judge refuses what cannot keep its promises, and warns of what is hardly enough.
func (r *Redis) judge(durability string, logf func(string, ...any)) error {
	if err := r.facts.old(); err != nil {
		return err
	}
	errs, warnings := r.facts.judge(durability)
	if logf != nil {
		for _, w := range warnings {
			logf("store: redis: %s", w)
		}
	}
	r.waits = durability != durableNone && r.facts.waits()
	return errors.Join(errs...)
}

// Claim makes this handle the writer. With a lease it fails with ErrDeposed unless the
// lease is held at that moment, so that nobody who has lost it can push the new leader
// off; nil claims in any case. It may be called again.
func (r *Redis) Claim(ctx context.Context, l *Lease) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	lease := ""
	if l != nil {
		lease = l.value
	}
	token := rand.Text() // the same however often it is sent: see unanswered
	out, err := r.persist(ctx, func() ([]any, error) {
		return r.read(ctx, claimScript, []string{r.space.meta(), r.space.lead(), r.space.try("hash"), r.space.try("set"), r.space.try("stream")}, lease, token)
	})
	if err != nil {
		return fmt.Errorf("claim: %w", err)
	}
	switch text(out[0]) {
	case "0":
		return fmt.Errorf("claim: %w", ErrDeposed)
	case "2":
		return fmt.Errorf("claim: the rows are of another raid, which numbers their layout %q: this one knows 1", text(out[1]))
	}
	r.epoch, r.turn, r.listed = text(out[1]), 0, map[string]bool{}
	r.open.Store(nil) // it was of an epoch that is over
	return nil
}

// persist repeats what does no harm when it is done twice, as long as the connection is
// all that fails, a few times.
func (r *Redis) persist(ctx context.Context, fn func() ([]any, error)) (out []any, err error) {
	for range 3 {
		if out, err = fn(); err == nil || !cut(err) {
			break
		}
	}
	return out, err
}

// A sending is a commit on its way.
type sending struct {
	rev   Rev // that it makes
	nonce string
	prog  *program
}

// Commit implements [Store]. A handle that is not the writer gets ErrConflict. A commit
// whose answer does not come is asked after, so that ErrAmbiguous is only what could not
// be found out within seconds; Load finds it out.
func (r *Redis) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.commitLocked(ctx, prev, writes); err != nil {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, err)
	}
	return prev + 1, nil
}

func (r *Redis) commitLocked(ctx context.Context, prev Rev, writes []queue.Write) error {
	if err := r.usable(ctx); err != nil {
		return err
	}
	if r.epoch == "" {
		return fmt.Errorf("%w: this store was opened to read only", ErrConflict)
	}
	ask, stop := context.WithTimeout(context.WithoutCancel(ctx), opTime)
	defer stop()
	s := &sending{rev: prev + 1, prog: compile(r.space, writes, func(table string) bool { return r.mayListLocked(ask, table) })}
	for t, words := range s.prog.tables.at {
		if len(words.entered) > 0 {
			r.listed[t] = true // whatever becomes of it
		}
	}
	// Big batches take their time on the wire.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTime+time.Duration(s.prog.bytes>>20)*100*time.Millisecond)
	defer cancel()
	if _, err := r.settleLocked(ctx); err != nil {
		return unsettled(err)
	}
	for {
		r.nonces++
		s.nonce = r.epoch + "-" + strconv.FormatInt(r.nonces, 36)
		err := r.sendLocked(ctx, s)
		if err == nil || !errors.Is(err, ErrAmbiguous) {
			return err
		}
		r.open.Store(s)
		applied, serr := r.settleLocked(ctx)
		switch {
		case serr != nil && errors.Is(serr, ErrConflict):
			return serr
		case serr != nil:
			return fmt.Errorf("%w, and asked: %v", err, serr)
		case applied:
			return nil
		case !cut(err):
			return fmt.Errorf("%w: redis: it did not answer in time: %v", ErrUnavailable, err)
		}
	}
}

// mayListLocked reports whether a row of a table may stand in lists. Only a writer changes
// that, so it is asked once.
func (r *Redis) mayListLocked(ctx context.Context, table string) bool {
	may, asked := r.listed[table]
	if asked {
		return may
	}
	n, err := r.client.Exists(ctx, r.space.in(table)).Result()
	if err != nil {
		return true // as it may for all that is known
	}
	r.listed[table] = n > 0
	return n > 0
}

// unsettled is the error of somebody who must not go on before the last commit is known.
func unsettled(err error) error {
	if errors.Is(err, ErrConflict) || errors.Is(err, ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// sendLocked sends a commit once.
func (r *Redis) sendLocked(ctx context.Context, s *sending) error {
	ctx, cancel := context.WithTimeout(ctx, opTime+time.Duration(s.prog.bytes>>20)*50*time.Millisecond)
	defer cancel()
	args := make([]any, 0, 64+4*len(s.prog.changed))
	args = append(args, r.epoch, strconv.FormatInt(r.turn, 10), strconv.FormatUint(uint64(s.rev-1), 10),
		strconv.FormatUint(uint64(s.rev), 10), s.nonce, packTexts(s.prog.changed))
	out, err := r.durably(ctx, commitScript, append([]string{r.space.meta(), r.space.log()}, s.prog.keys...), s.prog.words(args))
	switch {
	case err != nil && (refused(err) || unsent(err)):
		return unavailable(err)
	case err != nil && errors.As(err, new(redis.Error)):
		// It stopped halfway, by no fault that Redis foresees: somebody has keys of ours.
		return fmt.Errorf("redis: what the store wrote may be incomplete: %w", err)
	case err != nil:
		return fmt.Errorf("%w: redis: %w", ErrAmbiguous, err)
	case text(out[0]) == "1":
		return nil
	case text(out[1]) == "":
		return fmt.Errorf("%w: redis has lost everything", ErrConflict)
	case text(out[1]) != r.epoch:
		return fmt.Errorf("%w: another raid has taken over", ErrConflict)
	}
	return fmt.Errorf("%w: redis stands at revision %s", ErrConflict, text(out[2]))
}

// durably runs a script that writes, and returns when what it wrote is as durable as it
// will be.
func (r *Redis) durably(ctx context.Context, s *redis.Script, keys []string, args []any) ([]any, error) {
	if !r.waits {
		return s.Run(ctx, r.client, keys, args...).Slice()
	}
	run := func(call func(redis.Scripter) *redis.Cmd) ([]any, error) {
		p := r.client.Pipeline() // WAITAOF is about what its own connection wrote
		cmd := call(p)
		wait := p.Do(ctx, "WAITAOF", 1, 0, opTime.Milliseconds())
		p.Exec(ctx) // each has its own error
		out, err := cmd.Slice()
		if err != nil {
			return nil, err
		}
		if n, err := wait.Int64Slice(); err != nil || len(n) == 0 || n[0] < 1 {
			return nil, fmt.Errorf("WAITAOF: not on the disk in time (%v, %v)", n, err)
		}
		return out, nil
	}
	out, err := run(func(c redis.Scripter) *redis.Cmd { return s.EvalSha(ctx, c, keys, args...) })
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		out, err = run(func(c redis.Scripter) *redis.Cmd { return s.Eval(ctx, c, keys, args...) })
	}
	return out, err
}

// settleLocked finds out what became of a commit whose outcome is unknown, and makes sure
// that it stays so: the commit may still be in a buffer on its way, to be applied much
// later.
func (r *Redis) settleLocked(ctx context.Context) (applied bool, err error) {
	s := r.open.Load()
	for wait := 10 * time.Millisecond; s != nil; wait *= 2 {
		var out []any
		if out, err = r.askLocked(ctx, s); err == nil {
			r.open.Store(nil)
			switch text(out[0]) {
			case "1":
				return true, nil
			case "2":
				return false, fmt.Errorf("%w: another raid has taken over", ErrConflict)
			}
			return false, nil
		}
		if errors.As(err, new(redis.Error)) && !redis.HasErrorPrefix(err, "LOADING") || !pause(ctx, wait) {
			return false, fmt.Errorf("redis: what became of revision %d: %w", s.rev, err)
		}
	}
	return false, nil
}

func (r *Redis) askLocked(ctx context.Context, s *sending) ([]any, error) {
	ctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	r.turn++ // for each try, as one that is late must not end the next one's turn
	return r.durably(ctx, settleScript, []string{r.space.meta(), r.space.log()},
		[]any{r.epoch, r.turn, strconv.FormatUint(uint64(s.rev), 10), s.nonce})
}

// pause waits for d, or false when ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Facts returns what Redis said of itself when it was opened.
func (r *Redis) Facts() RedisFacts { return r.facts }

// Close implements [Store]. It gives up no lease: Resign does. It waits for a commit under
// way.
func (r *Redis) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Swap(true) {
		return nil
	}
	if err := r.client.Close(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}
