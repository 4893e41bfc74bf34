package main

import (
	"context"
	"fmt"
	"time"

	"github.com/rai-project/raid/sshd/store"
)

// benchRedis drives brain and a store in Redis in this process, as benchQueue does with
// SQLite. The peer is asynq on the same Redis, which syncs as often for both; they take
// turns.
func benchRedis(b *bench) {
	for _, fsync := range []string{"everysec", "always"} {
		peer := b.startAsynq(fsync)
		st := b.openRedis(peer.addr)
		br, stop := b.startBrain(st)
		var ones, manies, asynqs, asynqOnes sample
		for range 3 {
			one, _ := b.cycles(br, 1, 2*time.Second)
			asynqOnes = append(asynqOnes, peer.rate(1, 500))
			many, _ := b.cycles(br, 256, 4*time.Second)
			asynqs = append(asynqs, peer.rate(256, 20_000))
			ones, manies = append(ones, one), append(manies, many)
		}
		stop()
		if err := st.Close(); err != nil {
			b.Error(err)
		}
		peer.stop()
		b.times("submit + lease + finish, Redis, appendfsync "+fsync+", 1 client", ones, asynqOnes, 0)
		b.times("the same, 256 clients", manies, asynqs, 3)
	}
}

func (b *bench) openRedis(addr string) store.Store {
	st, err := store.OpenRedis(context.Background(), store.RedisOptions{URL: "redis://" + addr})
	if err != nil {
		b.Fatal(err)
	}
	if err := st.Claim(context.Background(), nil); err != nil {
		b.Fatal(err)
	}
	return st
}

// times adds a row of rates whose goal is a multiple of the peer's. A goal of 0 is none.
func (b *bench) times(what string, ours, peer sample, goal float64) {
	ratio := ours.median() / peer.median()
	r := row{what, fmt.Sprintf("%.0f (%.0f–%.0f) /s", ours.median(), ours.sorted()[0], ours.sorted()[len(ours)-1]),
		fmt.Sprintf("asynq, the same Redis: %.0f (%.0f–%.0f) /s", peer.median(), peer.sorted()[0], peer.sorted()[len(peer)-1]),
		number(ratio) + " ×", "—", ""}
	if goal > 0 {
		r.goal, r.verdict = fmt.Sprintf("≥ %g ×", goal), verdict(ratio >= goal)
	}
	b.rows = append(b.rows, r)
}
