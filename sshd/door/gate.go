package door

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// A gate limits how many connections may be between accept and login, in all and for
// each source (defect k). Past the total, nothing is accepted: the kernel's backlog
// keeps the rest. Past a source's share, its connections wait aside, first come first
// served, without counting in the total: one source, or one campus behind one address,
// can neither lock out the others nor be locked out itself.
//
// A slot is taken in this order: room, then enter; it is given back with giveBack
// before enter, with leave after.
type gate struct {
	slots     chan struct{}
	perSource int

	mu      sync.Mutex // protects the following
	sources map[netip.Prefix]*sourceCount
}

type sourceCount struct {
	inside int
	aside  []chan struct{} // closed when a slot is handed over
}

// asideFactor times the share of a source may wait aside; more are turned away. What
// waits costs a descriptor and a small goroutine, for at most the login time limit.
const asideFactor = 8

func newGate(total, perSource int) *gate {
	return &gate{
		slots:     make(chan struct{}, total),
		perSource: perSource,
		sources:   map[netip.Prefix]*sourceCount{},
	}
}

// room takes a slot of the total, or returns when ctx ends.
func (g *gate) room(ctx context.Context) error {
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// giveBack returns a slot that room took and enter has not used.
func (g *gate) giveBack() { <-g.slots }

// enter takes a slot of the source, or waits aside for one until ctx ends. When it
// returns false no slot is held.
func (g *gate) enter(ctx context.Context, from netip.Prefix) bool {
	g.mu.Lock()
	src := g.sources[from]
	if src == nil {
		src = &sourceCount{}
		g.sources[from] = src
	}
	if src.inside < g.perSource {
		src.inside++
		g.mu.Unlock()
		return true
	}
	if len(src.aside) >= asideFactor*g.perSource {
		g.mu.Unlock()
		g.giveBack()
		return false
	}
	turn := make(chan struct{})
	src.aside = append(src.aside, turn)
	g.mu.Unlock()
	g.giveBack()
	select {
	case <-turn:
		return true
	case <-ctx.Done():
		g.forget(from, turn)
		return false
	}
}

// forget takes turn out of the waiting line, or passes on the slot it got meanwhile.
func (g *gate) forget(from netip.Prefix, turn chan struct{}) {
	g.mu.Lock()
	src := g.sources[from]
	for i, t := range src.aside {
		if t == turn {
			src.aside = append(src.aside[:i], src.aside[i+1:]...)
			g.mu.Unlock()
			return
		}
	}
	g.mu.Unlock()
	g.leave(from)
}

// leave hands the slot to the first of the same source that waits, with its place in
// the total, or gives both back.
func (g *gate) leave(from netip.Prefix) {
	g.mu.Lock()
	defer g.mu.Unlock()
	src := g.sources[from]
	if len(src.aside) > 0 {
		close(src.aside[0])
		src.aside = src.aside[1:]
		return
	}
	if src.inside--; src.inside == 0 {
		delete(g.sources, from)
	}
	<-g.slots
}

// origin is the address of the other side. Zero when it has none, as a pipe.
func origin(nc net.Conn) netip.AddrPort {
	at, err := netip.ParseAddrPort(nc.RemoteAddr().String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port())
}

// sourceOf is whom the limits count: an IPv4 address, or the /64 an IPv6 host may
// pick its addresses from.
func sourceOf(from netip.AddrPort) netip.Prefix {
	bits := 32
	if from.Addr().Is6() {
		bits = 64
	}
	p, err := from.Addr().Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
