// Package sim runs made-up classes through the scheduler, in virtual time, and
// measures how fair it was to whom.
//
// The real [queue.Core] is driven by the commands a real raid would send it, with
// heartbeats every five seconds; beside it run the two orders that job queues
// elsewhere use, first come first served and round robin by team. Every run is
// reproducible: the same seed gives the same numbers.
//
// Non-goal: predicting a real class. The workloads are those of the paper that
// describes RAI (Dakkak et al., IPDPSW 2017) and two made to hurt.
package sim

import (
	"container/heap"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// A Job is one submission: when, whose, and how long it will run.
type Job struct {
	At         queue.Millis
	User, Team string
	Length     queue.Millis
}

// A Workload is a class on a number of GPUs.
type Workload struct {
	Name  string
	GPUs  int
	Limit queue.Millis   // the time limit of every job
	Until queue.Millis   // measured up to here; 0: until all is done
	Jobs  []Job          // by At
	Light func(Job) bool // the users whose waits are reported
}

// An Outcome is what one order made of a workload.
type Outcome struct {
	Order    string
	Jain     float64 // of GPU time between the tenants; 1 is equal
	WorstLag float64 // GPU-seconds: the most one backlogged tenant got ahead of another
	Used     float64 // share of the GPUs' time that was used
	P50, P95 float64 // wait of the light users, seconds
	Max      float64
	Started  int
	Shares   []Share // GPU time of every tenant, by name
	Waits    []Wait  // of the light users' jobs, in order of start
}

// A Share is what one tenant got, in GPU-seconds.
type Share struct {
	Name string
	Got  float64
}

// A Wait is one job's: when it was queued and for how long, in seconds.
type Wait struct{ At, For float64 }

// An order is a scheduler under test.
type order interface {
	submit(now queue.Millis, id int, j Job)
	// next returns the jobs that start now.
	next(now queue.Millis, free int) []int
	finish(now queue.Millis, id int)
	beat(now queue.Millis)
}

// Run puts w through the named order: "fifo", "round-robin" or "raid".
func Run(w Workload, name string) Outcome {
	var o order
	switch name {
	case "fifo":
		o = &fifo{}
	case "round-robin":
		o = &roundRobin{queues: map[string][]int{}}
	default:
		o = newFair(w)
	}
	s := &simulation{w: w, order: o, free: w.GPUs, tenants: map[string]*tenant{}, running: map[int]queue.Millis{}}
	s.run()
	return s.outcome(name)
}

// A simulation is one run.
type simulation struct {
	w       Workload
	order   order
	free    int
	ends    ends
	running map[int]queue.Millis // job → start
	tenants map[string]*tenant
	all     []*tenant
	busy    queue.Millis
	lags    []span // of each pair of tenants, by the larger index
	worst   float64
	started []int
	startAt []queue.Millis
	last    queue.Millis
}

// A tenant is whom fairness is between.
type tenant struct {
	waiting int // queued jobs
	running int
	got     float64 // GPU-seconds
}

// A span is the range of a difference while both tenants have jobs waiting.
type span struct {
	low, high float64
	open      bool
}

const beatEvery = 5000

// run is the event loop: arrivals, ends and heartbeats, in the order of time.
func (s *simulation) run() {
	arrived := 0
	for now, beat := queue.Millis(0), queue.Millis(0); ; {
		next := queue.Millis(math.MaxInt64)
		if arrived < len(s.w.Jobs) {
			next = s.w.Jobs[arrived].At
		}
		if len(s.ends) > 0 {
			next = min(next, s.ends[0].at)
		}
		if len(s.running) > 0 {
			next = min(next, beat+beatEvery)
		}
		if next == math.MaxInt64 || s.w.Until > 0 && next > s.w.Until {
			return
		}
		s.pass(now, next)
		now = next
		for arrived < len(s.w.Jobs) && s.w.Jobs[arrived].At <= now {
			s.arrive(now, arrived)
			arrived++
		}
		for len(s.ends) > 0 && s.ends[0].at <= now {
			s.end(now, heap.Pop(&s.ends).(end).id)
		}
		if now >= beat+beatEvery {
			beat = now
			s.order.beat(now)
		}
		s.start(now)
		s.measure()
	}
}

func (s *simulation) tenant(id int) *tenant {
	name := s.w.Jobs[id].Team
	t := s.tenants[name]
	if t == nil {
		t = &tenant{}
		s.tenants[name] = t
		s.lags = append(s.lags, make([]span, len(s.all))...)
		s.all = append(s.all, t)
	}
	return t
}

func (s *simulation) arrive(now queue.Millis, id int) {
	s.tenant(id).waiting++
	s.order.submit(now, id, s.w.Jobs[id])
}

func (s *simulation) start(now queue.Millis) {
	for _, id := range s.order.next(now, s.free) {
		t := s.tenant(id)
		t.waiting--
		t.running++
		s.free--
		s.running[id] = now
		s.started, s.startAt = append(s.started, id), append(s.startAt, now)
		heap.Push(&s.ends, end{now + min(s.w.Jobs[id].Length, s.w.Limit), id})
	}
}

func (s *simulation) end(now queue.Millis, id int) {
	s.tenant(id).running--
	s.free++
	delete(s.running, id)
	s.order.finish(now, id)
}

// pass lets running jobs use their GPUs until next.
func (s *simulation) pass(now, next queue.Millis) {
	for _, t := range s.all {
		t.got += float64(next-now) / 1000 * float64(t.running)
		s.busy += (next - now) * queue.Millis(t.running)
	}
	s.last = next
}

// measure keeps, for each pair of tenants that both have jobs waiting, the range of
// the difference of what they got: how far one was ahead of the other.
func (s *simulation) measure() {
	for i, a := range s.all {
		row := s.lags[i*(i-1)/2:]
		for k, b := range s.all[:i] {
			l := &row[k]
			if a.waiting == 0 || b.waiting == 0 {
				l.open = false
				continue
			}
			d := a.got - b.got
			if !l.open {
				*l = span{d, d, true}
			}
			l.low, l.high = min(l.low, d), max(l.high, d)
			s.worst = max(s.worst, l.high-l.low)
		}
	}
}

func (s *simulation) outcome(name string) Outcome {
	o := Outcome{Order: name, WorstLag: s.worst, Started: len(s.started)}
	var sum, squares float64
	for _, t := range s.all {
		sum += t.got
		squares += t.got * t.got
	}
	o.Jain = sum * sum / (float64(len(s.all)) * squares)
	o.Used = float64(s.busy) / float64(s.last*queue.Millis(s.w.GPUs))
	for _, name := range slices.Sorted(maps.Keys(s.tenants)) {
		o.Shares = append(o.Shares, Share{name, s.tenants[name].got})
	}
	var light []float64
	for i, id := range s.started {
		if j := s.w.Jobs[id]; s.w.Light == nil || s.w.Light(j) {
			wait := Wait{float64(j.At) / 1000, float64(s.startAt[i]-j.At) / 1000}
			o.Waits = append(o.Waits, wait)
			light = append(light, wait.For)
		}
	}
	if slices.Sort(light); len(light) > 0 {
		o.P50, o.P95, o.Max = light[len(light)/2], light[len(light)*95/100], light[len(light)-1]
	}
	return o
}

type end struct {
	at queue.Millis
	id int
}

// ends is the heap of running jobs by their end.
type ends []end

func (e ends) Len() int { return len(e) }
func (e ends) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].id < e[j].id
}
func (e ends) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *ends) Push(x any)   { *e = append(*e, x.(end)) }
func (e *ends) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

// fifo is first come, first served: RAI's own order.
type fifo struct{ waiting []int }

func (f *fifo) submit(_ queue.Millis, id int, _ Job) { f.waiting = append(f.waiting, id) }
func (f *fifo) finish(queue.Millis, int)             {}
func (f *fifo) beat(queue.Millis)                    {}
func (f *fifo) next(_ queue.Millis, free int) []int {
	n := min(free, len(f.waiting))
	out := f.waiting[:n]
	f.waiting = f.waiting[n:]
	return out
}

// roundRobin gives each team one job in turn, as grouped queues do.
type roundRobin struct {
	queues map[string][]int
	ring   []string
}

func (r *roundRobin) submit(_ queue.Millis, id int, j Job) {
	if len(r.queues[j.Team]) == 0 {
		r.ring = append(r.ring, j.Team)
	}
	r.queues[j.Team] = append(r.queues[j.Team], id)
}
func (r *roundRobin) finish(queue.Millis, int) {}
func (r *roundRobin) beat(queue.Millis)        {}
func (r *roundRobin) next(_ queue.Millis, free int) (out []int) {
	for ; free > 0 && len(r.ring) > 0; free-- {
		team := r.ring[0]
		r.ring = r.ring[1:]
		out = append(out, r.queues[team][0])
		if r.queues[team] = r.queues[team][1:]; len(r.queues[team]) > 0 {
			r.ring = append(r.ring, team)
		}
	}
	return out
}

// fair is the real core, with one runner for each GPU.
type fair struct {
	core   *queue.Core
	limit  time.Duration
	ids    map[int64]int       // the core's id → ours
	leases map[int]queue.Offer // ours → lease
}

const pool = "sim"

func newFair(w Workload) *fair {
	f := &fair{core: queue.New(queue.DefaultPolicy()), limit: time.Duration(w.Limit) * time.Millisecond,
		ids: map[int64]int{}, leases: map[int]queue.Offer{}}
	for i := range w.GPUs {
		id := "gpu" + strconv.Itoa(i)
		f.apply(0, queue.Join{Runner: queue.Runner{ID: id, Name: id, Pools: []string{pool}, GPUs: []string{"sim"}}})
		f.apply(0, queue.Beat{Runner: id, Idle: true})
	}
	return f
}

func (f *fair) apply(now queue.Millis, cmd queue.Command) any {
	reply, err := f.core.Apply(now, cmd)
	if err != nil {
		panic("sim: " + err.Error()) // the simulation only says what is true
	}
	f.core.Flush()
	return reply
}

func (f *fair) submit(now queue.Millis, id int, j Job) {
	rec := job.Record{Job: job.Job{User: j.User, Team: j.Team, Pool: pool, Kind: "run"},
		Spec: job.Spec{GPUs: 1, Limits: job.Limits{Time: f.limit}}}
	f.ids[f.apply(now, queue.Submit{Record: rec}).(*job.Record).ID] = id
}

func (f *fair) next(queue.Millis, int) []int {
	var out []int
	for _, o := range f.core.Effects().Offers {
		id := f.ids[o.Job]
		f.leases[id] = o
		out = append(out, id)
	}
	return out
}

func (f *fair) finish(now queue.Millis, id int) {
	o := f.leases[id]
	f.apply(now, queue.Finish{Runner: o.Runner, Lease: o.Lease, Result: job.Result{Reason: job.ReasonExit}})
	delete(f.leases, id)
	delete(f.ids, o.Job)
	f.apply(now, queue.Beat{Runner: o.Runner, Idle: true})
}

func (f *fair) beat(now queue.Millis) {
	for _, id := range slices.Sorted(maps.Keys(f.leases)) {
		o := f.leases[id]
		f.apply(now, queue.Beat{Runner: o.Runner, Held: &o.Lease})
	}
}
