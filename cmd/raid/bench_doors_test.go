package main

import (
	"fmt"
	"io"
	"path/filepath"
	"syscall"
	"time"
)

// benchDoors measures what it costs that a client calls another raid than the one that
// leads, and how long nobody leads after the death of the one that did.
func benchDoors(b *bench) {
	redis := b.startDurableRedis()
	toml := "[queue]\nstore = \"" + redis.url + "\"\n[runners]\nlocal = "
	leader := b.startRaid(b.T, "leader", toml+"1\n")
	leader.await(b)
	other := b.startRaid(b.T, "other", toml+"0\n")
	other.await(b)
	s := b.race(21,
		contestant{"door", func() float64 { return b.firstByteOf(other.server, "echo hi") }},
		contestant{"leader", func() float64 { return b.firstByteOf(leader.server, "echo hi") }})
	b.versus("submit → first byte through another raid's door", s["door"], s["leader"], "at the leader", 1.5)
	const loud = "head -c 268435456 /dev/zero"
	s = b.race(3,
		contestant{"door", func() float64 { return timed(func() { b.do(other.server, fast, nil, "submit -- "+loud) }) }},
		contestant{"leader", func() float64 { return timed(func() { b.do(leader.server, fast, nil, "submit -- "+loud) }) }})
	b.versus("256 MiB of output, followed through a door", s["door"], s["leader"], "at the leader", 0)

	var took sample
	for range 3 {
		syscall.Kill(leader.pid, syscall.SIGKILL)
		took = append(took, timed(func() { other.await(b) }))
		leader, other = other, b.again(leader, toml+"0\n")
		other.await(b)
	}
	b.number("fail-over: from kill -9 of the leader until another answers", took.in("ms"), "≤ 4 s", took.median() <= 4000)
}

// startDurableRedis starts a Redis that a queue may be in.
func (b *bench) startDurableRedis() *redisServer {
	return b.startRedisWith(b.T, "--appendonly", "yes", "--appendfsync", "everysec")
}

// await waits until the raid answers a question, which takes one that leads.
func (r *raid) await(b *bench) {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		if r.server.command(fast, "status").Run() == nil {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("no raid leads")
		}
	}
}

// again starts a raid that was killed, where it was.
func (b *bench) again(r *raid, toml string) *raid {
	b.Helper()
	return b.startRaid(b.T, filepath.Base(r.state), toml)
}

// firstByteOf returns how many milliseconds it takes from the start of ssh until the first
// byte of a job arrives. The job's end is waited for.
func (b *bench) firstByteOf(s server, line string) float64 {
	b.Helper()
	cmd := s.command(fast, "submit", "--", line)
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	var first [1]byte
	_, err = io.ReadFull(out, first[:])
	took := time.Since(start)
	io.Copy(io.Discard, out)
	if werr := cmd.Wait(); err != nil || werr != nil {
		b.Fatal(fmt.Errorf("submit: %v, %v", err, werr))
	}
	return float64(took.Microseconds()) / 1000
}
