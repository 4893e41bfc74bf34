package sim

import (
	"cmp"
	"fmt"
	"maps"
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
	for n := range 20_000 { // by turns, as users do who submit when one has ended
		for i := range 10 {
			mean := 10_000 * math.Pow(1.6, float64(i))
			length := max(1000, queue.Millis(r.ExpFloat64()*mean))
			if float64(n)*mean < 8*until { // more would never start, even alone
				name := fmt.Sprintf("u%d", i)
				w.Jobs = append(w.Jobs, Job{User: name, Team: name, Length: length})
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
// weeks, three quarters of them in the last two, a day and night rhythm, a peak near
// 560 jobs an hour on the last evening, 30 GPUs that are then just not enough.
func Class(seed uint64) Workload {
	r := rand.New(rand.NewPCG(seed, 3))
	w := Workload{Name: "RAI's class: 176 students, 58 teams, 40,000 jobs, 30 GPUs", GPUs: 30, Limit: 3600_000}
	const days, jobs = 35, 40_000
	shares, total := make([]float64, days*24), 0.0
	for h := range shares {
		left := float64(days) - float64(h)/24
		shares[h] = math.Exp(-left/9.5) * (1.1 + math.Sin(2*math.Pi*(float64(h%24)-10)/24))
		if left < 0.75 {
			shares[h] *= 1.7 // the deadline
		}
		total += shares[h]
	}
	for h, s := range shares {
		for range int(math.Round(jobs * s / total)) {
			u := r.IntN(176)
			w.Jobs = append(w.Jobs, Job{
				At:   queue.Millis((float64(h) + r.Float64()) * 3600_000),
				User: fmt.Sprintf("s%d", u), Team: fmt.Sprintf("team%d", u%58),
				Length: max(2000, min(3600_000, queue.Millis(math.Exp(r.NormFloat64()*1.1)*115_000))),
			})
		}
	}
	w.Light = lighter(w.Jobs)
	return w.sorted()
}

// lighter picks the jobs of the half of the teams that use less.
func lighter(jobs []Job) func(Job) bool {
	used := map[string]queue.Millis{}
	for _, j := range jobs {
		used[j.Team] += j.Length
	}
	all := slices.Sorted(maps.Values(used))
	median := all[len(all)/2]
	return func(j Job) bool { return used[j.Team] < median }
}

// Peak is the most jobs that arrive in one hour.
func (w Workload) Peak() int {
	most := 0
	for i, k := 0, 0; i < len(w.Jobs); i++ {
		for w.Jobs[i].At-w.Jobs[k].At >= 3600_000 {
			k++
		}
		most = max(most, i-k+1)
	}
	return most
}

func (w Workload) sorted() Workload {
	slices.SortStableFunc(w.Jobs, func(a, b Job) int { return cmp.Compare(a.At, b.At) })
	return w
}
