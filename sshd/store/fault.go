package store

import (
	"context"
	"fmt"
	"time"

	"github.com/rai-project/raid/sshd/queue"
)

// An Op names a method of Store.
type Op string

const (
	OpLoad   Op = "load"
	OpCommit Op = "commit"
	OpGet    Op = "get"
	OpList   Op = "list" // in either direction
)

// A Call is one call of a faulty store, shown to its plan.
type Call struct {
	Op     Op
	N      int           // counts the calls of this Op, from 1
	Writes []queue.Write // of a commit
}

// A Failure is what a plan wants to go wrong.
type Failure int

const (
	Works            Failure = iota
	Unavailable              // ErrUnavailable, nothing changed
	AmbiguousApplied         // ErrAmbiguous, and the batch is there
	AmbiguousLost            // ErrAmbiguous, and nothing changed
)

// Fault wraps s so that plan decides, call by call, what fails. A read fails with
// ErrUnavailable whatever the plan's failure. plan is never called concurrently
// with itself; Close always works. For tests of who uses a store.
func Fault(s Store, plan func(Call) Failure) Store {
	f := &faulty{Store: s, plan: plan, calls: make(chan map[Op]int, 1)}
	f.calls <- map[Op]int{}
	return f
}

type faulty struct {
	Store
	plan  func(Call) Failure
	calls chan map[Op]int // holds the counts; whoever took them may ask the plan
}

func (f *faulty) ask(op Op, writes []queue.Write) Failure {
	calls := <-f.calls
	defer func() { f.calls <- calls }()
	calls[op]++
	return f.plan(Call{Op: op, N: calls[op], Writes: writes})
}

// read returns the error a read shall have, or nil.
func (f *faulty) read(op Op) error {
	if f.ask(op, nil) == Works {
		return nil
	}
	return fmt.Errorf("%s: injected: %w", op, ErrUnavailable)
}

func (f *faulty) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	if err := f.read(OpLoad); err != nil {
		return 0, err
	}
	return f.Store.Load(ctx, tables, fn)
}

func (f *faulty) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	switch f.ask(OpCommit, writes) {
	case Works:
		return f.Store.Commit(ctx, prev, writes)
	case AmbiguousApplied:
		if _, err := f.Store.Commit(ctx, prev, writes); err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("commit on revision %d: injected: %w", prev, ErrAmbiguous)
	case AmbiguousLost:
		return 0, fmt.Errorf("commit on revision %d: injected: %w", prev, ErrAmbiguous)
	}
	return 0, fmt.Errorf("commit on revision %d: injected: %w", prev, ErrUnavailable)
}

func (f *faulty) Get(ctx context.Context, table, key string) ([]byte, error) {
	if err := f.read(OpGet); err != nil {
		return nil, err
	}
	return f.Store.Get(ctx, table, key)
}

func (f *faulty) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	if err := f.read(OpList); err != nil {
		return nil, err
	}
	return f.Store.List(ctx, list, before, n)
}

func (f *faulty) Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error) {
	if err := f.read(OpList); err != nil {
		return nil, err
	}
	return f.Store.Ascend(ctx, list, after, n)
}

// Delay wraps s so that a call waits for as long as plan says before it begins, or
// until its ctx ends. plan may be called concurrently with itself. For tests of who
// uses a store.
func Delay(s Store, plan func(Op) time.Duration) Store { return &delayed{s, plan} }

type delayed struct {
	Store
	plan func(Op) time.Duration
}

func (d *delayed) wait(ctx context.Context, op Op) error {
	select {
	case <-time.After(d.plan(op)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *delayed) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	if err := d.wait(ctx, OpLoad); err != nil {
		return 0, err
	}
	return d.Store.Load(ctx, tables, fn)
}

func (d *delayed) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	if err := d.wait(ctx, OpCommit); err != nil {
		return 0, err
	}
	return d.Store.Commit(ctx, prev, writes)
}

func (d *delayed) Get(ctx context.Context, table, key string) ([]byte, error) {
	if err := d.wait(ctx, OpGet); err != nil {
		return nil, err
	}
	return d.Store.Get(ctx, table, key)
}

func (d *delayed) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	if err := d.wait(ctx, OpList); err != nil {
		return nil, err
	}
	return d.Store.List(ctx, list, before, n)
}

func (d *delayed) Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error) {
	if err := d.wait(ctx, OpList); err != nil {
		return nil, err
	}
	return d.Store.Ascend(ctx, list, after, n)
}
