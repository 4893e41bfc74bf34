package sim

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/rai-project/raid/sshd/queue"
)

// Backlogged is ten users who always have jobs waiting, with mean lengths from 10 to
// 690 seconds: who is fair by count gives the last sixty times as much as the first.
func Backlogged(seed uint64) Workload {
	r := rand.New(rand.NewPCG(seed, 1))
	const until, limit = 200_000_000, 1_800_000
	w := Workload{Name: "ten users, always backlogged, jobs of 10 to 690 s", GPUs: 8, Limit: limit, Until: until}
	for i := range 10 {
		mean := 10_000 * math.Pow(1.6, float64(i))
		name := fmt.Sprintf("u%d", i)
		for total := 0.0; total < 8*until; { // enough to have all GPUs alone
			j := Job{User: name, Team: name, Length: max(1000, queue.Millis(r.ExpFloat64()*mean))}
			total += float64(min(j.Length, limit))
			w.Jobs = append(w.Jobs, j)
			if len(w.Jobs) > (i+1)*40_000 {
				break
			}
		}
	}
	return w
}

// DeadlineNight is two users with 400 ten-minute jobs each at the start, and sixty
// with a short job every twenty minutes, for twelve hours.
func DeadlineNight(seed uint64) Workload {
	r := rand.New(rand.NewPCG(seed, 2))
	w := Workload{Name: "two hogs with 400 ten-minute jobs, sixty light users", GPUs: 8, Limit: 1_800_000, Until: 12 * 3600_000,
		Light: func(j Job) bool { return j.Team[0] == 'l' }}
	for i := range 800 {
		name := fmt.Sprintf("hog%d", i%2)
		w.Jobs = append(w.Jobs, Job{User: name, Team: name, Length: 600_000})
	}
	for i := range 60 {
		name := fmt.Sprintf("light%d", i)
		for at := r.ExpFloat64() * 1200_000; at < float64(w.Until); at += r.ExpFloat64() * 1200_000 {
			w.Jobs = append(w.Jobs, Job{At: queue.Millis(at), User: name, Team: name, Length: max(1000, queue.Millis(r.ExpFloat64()*45_000))})
		}
	}
	return w.sorted()
}

// Class is the course of the paper: 176 students in 58 teams, 40,000 jobs in five
// weeks, three quarters of them in the last two, a day and night rhythm, a peak of
// about 560 jobs an hour, 30 GPUs.
func Class(seed uint64) Workload {
	r := rand.New(rand.NewPCG(seed, 3))
	w := Workload{Name: "RAI's class: 176 students, 58 teams, 40,000 jobs, 30 GPUs", GPUs: 30, Limit: 3600_000}
	const days = 35
	var shares []float64 // of each hour
	for h := range days * 24 {
		left := float64(days) - float64(h)/24
		shares = append(shares, math.Exp(-left/9)*(1.1+math.Sin(2*math.Pi*(float64(h%24)-10)/24)))
	}
	total := 0.0
	for _, s := range shares {
		total += s
	}
	for h, s := range shares {
		for range int(math.Round(40_000 * s / total)) {
			u := r.IntN(176)
			w.Jobs = append(w.Jobs, Job{
				At:   queue.Millis((float64(h) + r.Float64()) * 3600_000),
				User: fmt.Sprintf("s%d", u), Team: fmt.Sprintf("team%d", u%58),
				Length: max(2000, min(3600_000, queue.Millis(math.Exp(r.NormFloat64()*1.1)*70_000))),
			})
		}
	}
	return w.sorted()
}

func (w Workload) sorted() Workload {
	slices.SortStableFunc(w.Jobs, func(a, b Job) int { return cmp.Compare(a.At, b.At) })
	return w
}
