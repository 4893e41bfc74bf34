package store

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// The scripts, each with its contract at the top. EVALSHA runs them; a Redis that does not
// know one, as after a restart, is sent it.
var (
	//go:embed lua/commit.lua
	commitLua string
	//go:embed lua/claim.lua
	claimLua string
	//go:embed lua/settle.lua
	settleLua string
	//go:embed lua/load.lua
	loadLua string
	//go:embed lua/since.lua
	sinceLua string
	//go:embed lua/list.lua
	listLua string
	//go:embed lua/acquire.lua
	acquireLua string
	//go:embed lua/renew.lua
	renewLua string
	//go:embed lua/resign.lua
	resignLua string
	//go:embed lua/doors.lua
	doorsLua string
)

var (
	commitScript  = redis.NewScript(commitLua)
	claimScript   = redis.NewScript(claimLua)
	settleScript  = redis.NewScript(settleLua)
	loadScript    = redis.NewScript(loadLua)
	sinceScript   = redis.NewScript(sinceLua)
	listScript    = redis.NewScript(listLua)
	acquireScript = redis.NewScript(acquireLua)
	renewScript   = redis.NewScript(renewLua)
	resignScript  = redis.NewScript(resignLua)
	doorsScript   = redis.NewScript(doorsLua)
)

// read runs a script that answers with texts, bounded by opTime.
func (r *Redis) read(ctx context.Context, s *redis.Script, keys []string, args ...any) ([]any, error) {
	if err := r.usable(ctx); err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	out, err := s.Run(short, r.client, keys, args...).Slice()
	if err != nil {
		return nil, r.failed(ctx, err)
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

// text is one value of an answer; what is not there is "".
func text(v any) string {
	s, _ := v.(string)
	return s
}

// usable reports why nothing can be done.
func (r *Redis) usable(ctx context.Context) error {
	if r.closed.Load() {
		return ErrClosed
	}
	return context.Cause(ctx)
}

// failed says what the error of something means that changed nothing, or may be done
// again: the end of ctx, a Close, or a Redis that may be back later.
func (r *Redis) failed(ctx context.Context, err error) error {
	if d, ok := ctx.Deadline(); ok && !time.Now().Before(d) {
		<-ctx.Done() // a connection's timer may be faster
	}
	if u := r.usable(ctx); u != nil {
		return u
	}
	var reply redis.Error
	if errors.As(err, &reply) && !refused(err) {
		return fmt.Errorf("redis: %w", err)
	}
	return unavailable(err)
}

func unavailable(err error) error { return fmt.Errorf("%w: redis: %w", ErrUnavailable, err) }

// refusals are how the replies begin with which Redis refuses to do anything at all, for
// now or until somebody has mended it.
var refusals = []string{"OOM", "MISCONF", "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "BUSY", "UNKILLABLE",
	"CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK", "NOAUTH", "NOPERM", "WRONGPASS", "ERR max number of clients", "ERR invalid password",
	"ERR AUTH", "ERR DB index", "NOPROTO"}

func refused(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return false
	}
	return slices.ContainsFunc(refusals, func(p string) bool { return strings.HasPrefix(reply.Error(), p) })
}

// unsent reports whether a command that failed cannot have reached Redis.
func unsent(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial" || errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted) ||
		errors.Is(err, redis.ErrClosed)
}

// cut reports whether the connection ended, which a new one may mend.
func cut(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || ok && !op.Timeout()
}
