package janitor

import (
	"os"
	"time"

	"github.com/rai-project/raid/runner/job"
)

// A Report is what there was after a sweep, in bytes, and what the sweep removed.
type Report struct {
	At        job.Time `json:"at"`
	Jobs      int      `json:"jobs"` // whose files are kept, unfinished ones among them
	Uploads   int64    `json:"uploads"`
	Outputs   int64    `json:"outputs"`   // /build of jobs, and their logs where they are blobs
	Logs      int64    `json:"logs"`      // as the disk counts, folders and all
	Unclaimed int64    `json:"unclaimed"` // blobs of no job that may yet get one
	Database  int64    `json:"database"`
	Free      int64    `json:"free"`
	Total     int64    `json:"total"`
	Reserve   int64    `json:"reserve"`   // uploads leave it free
	Margin    int64    `json:"margin"`    // beyond it: with less free files go sooner
	PerDay    int64    `json:"per_day"`   // bytes of what is kept, by when it came: one day's
	OverDays  int      `json:"over_days"` // how many days that was measured over
	DaysLeft  *int     `json:"days_left"` // until files go for room; nil: never, or not in ten years

	Expired   int   `json:"expired"`   // jobs whose files this sweep removed
	Forgotten int   `json:"forgotten"` // jobs whose record it removed
	Freed     int64 `json:"freed"`

	Elsewhere bool `json:"elsewhere"` // uploads, outputs and logs are blobs that take no room here
	Away      bool `json:"away"`      // and their store does not answer: nothing is known of them

	short bool
}

// The rate is that of the last days, of no more than measured of them.
const (
	day      = 24 // hours
	measured = 7  // days
	far      = 3650
)

func (s *sweep) report() (Report, error) {
	r := Report{At: job.At(s.now), Jobs: len(s.jobs), Unclaimed: s.unclaimed, Database: size(s.Database),
		Expired: s.expired, Forgotten: s.forgotten, Freed: s.freed, short: s.short,
		Elsewhere: s.Blobs.Shared(), Away: s.blind}
	var err error
	if r.Free, r.Total, err = s.Free(); err != nil {
		return r, err
	}
	r.Reserve, r.Margin = s.Blobs.Reserve(r.Total), s.margin(r.Total)
	keep := int((s.Files + time.Hour - 1) / time.Hour)
	p := pace{keep: keep, leaves: map[int]int64{}}
	for _, h := range s.blobs {
		if h.upload {
			r.Uploads += h.size
		} else {
			r.Outputs += h.size
		}
		if !r.Elsewhere {
			p.add(h)
		}
	}
	for _, h := range s.jobs {
		r.Logs += h.size
		p.add(h)
	}
	r.PerDay, r.OverDays = p.rate()
	if left, ok := p.left(r.Free-r.Reserve-r.Margin, r.PerDay); ok {
		r.DaysLeft = &left
	}
	return r, nil
}

// size returns how large a file and those beside it are: SQLite has a log and an index.
func size(path string) (n int64) {
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(path + suffix); err == nil {
			n += info.Size()
		}
	}
	return n
}

// A pace is how fast the disk fills, told by what is kept.
type pace struct {
	keep   int           // hours that files are kept; 0: for ever
	came   int64         // bytes of the last days
	oldest int           // hours
	leaves map[int]int64 // bytes that go by age, by how many days from now; 1 is the next
}

func (p *pace) add(h held) {
	if h.came < measured*day {
		p.came += h.size
	}
	p.oldest = max(p.oldest, int(h.came))
	p.leaves[max(1, (p.keep-int(h.goes)+day-1)/day)] += h.size
}

// rate returns how many bytes come in a day, and how many days that was measured over:
// as far back as there is something, and one day at least, unless files are not kept
// that long.
func (p *pace) rate() (perDay int64, days int) {
	least := day
	if p.keep > 0 {
		least = min(least, p.keep)
	}
	hours := min(max(p.oldest+1, least), measured*day)
	return p.came * day / int64(hours), (hours + day - 1) / day
}

// left returns after how many days at that rate there is no room any more; ok is false
// if that never happens because as much goes as comes, or is further than anybody plans.
func (p *pace) left(room, perDay int64) (days int, ok bool) {
	if room <= 0 {
		return 0, true
	}
	last := far
	if p.keep > 0 {
		last = min(last, (p.keep+day-1)/day) // from then on as much goes as comes
	}
	for d := 1; d <= last; d++ {
		room -= perDay
		if p.keep > 0 {
			room += p.leaves[d]
		}
		if room <= 0 {
			return d, true
		}
	}
	return 0, false
}
