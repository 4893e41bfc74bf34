package sim

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// Orders are the schedulers that are compared, raid's last.
func Orders() []string { return []string{"fifo", "round-robin", "raid"} }

// A Report is every order on every workload.
type Report struct {
	Workloads []Workload
	Outcomes  [][]Outcome // [workload][order]
}

// Compare runs everything for one seed; progress is told of each run, nil for nobody.
func Compare(seed uint64, progress func(workload, order string)) Report {
	r := Report{Workloads: []Workload{Backlogged(seed), DeadlineNight(seed), Class(seed)}}
	for _, w := range r.Workloads {
		var row []Outcome
		for _, o := range Orders() {
			if progress != nil {
				progress(w.Name, o)
			}
			row = append(row, Run(w, o))
		}
		r.Outcomes = append(r.Outcomes, row)
	}
	return r
}

// Print writes the table.
func (r Report) Print(w io.Writer) error {
	var b strings.Builder
	for i, load := range r.Workloads {
		fmt.Fprintf(&b, "%s (%d jobs, peak %d an hour)\n", load.Name, len(load.Jobs), load.Peak())
		fmt.Fprintf(&b, "  %-12s %8s %16s %6s %28s\n", "order", "Jain", "worst lag GPU-s", "used", "light users wait p50/p95/max s")
		for _, o := range r.Outcomes[i] {
			fmt.Fprintf(&b, "  %-12s %8.4f %16.0f %6.3f %12.0f / %.0f / %.0f\n", o.Order, o.Jain, o.WorstLag, o.Used, o.P50, o.P95, o.Max)
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// The picture: what each user got when all always want more, and how long light
// teams waited while the deadline came near.
const (
	width, height = 900, 620
	font          = `font-family="system-ui, sans-serif" font-size="13" fill="#333"`
)

var colours = map[string]string{"fifo": "#b0b7c3", "round-robin": "#e0a458", "raid": "#2a7f62"}

// Draw writes the picture as SVG.
func (r Report) Draw(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" %s>`+"\n", width, height, font)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	r.drawShares(&b, 30)
	r.drawWaits(&b, 330)
	x := 560
	for _, o := range Orders() {
		fmt.Fprintf(&b, `<rect x="%d" y="14" width="12" height="12" fill="%s"/><text x="%d" y="25">%s</text>`+"\n", x, colours[o], x+18, o)
		x += 110
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (r Report) drawShares(b *strings.Builder, top int) {
	fmt.Fprintf(b, `<text x="40" y="%d" font-weight="600">GPU hours of ten users who always have jobs waiting (mean length 10 s to 690 s)</text>`+"\n", top-5)
	most := 0.0
	for _, o := range r.Outcomes[0] {
		for _, s := range o.Shares {
			most = max(most, s.Got)
		}
	}
	const room = 230.0
	base := float64(top) + room + 10
	for i, o := range r.Outcomes[0] {
		for k, s := range o.Shares {
			h := s.Got / most * room
			fmt.Fprintf(b, `<rect x="%d" y="%.1f" width="20" height="%.1f" fill="%s"/>`+"\n", 60+k*82+i*22, base-h, h, colours[o.Order])
		}
	}
	for k, s := range r.Outcomes[0][0].Shares {
		fmt.Fprintf(b, `<text x="%d" y="%.0f">%s</text>`+"\n", 84+k*82, base+18, s.Name)
	}
	fmt.Fprintf(b, `<text x="8" y="%.0f">%.0f h</text>`+"\n", base-room+5, most/3600)
}

func (r Report) drawWaits(b *strings.Builder, top int) {
	last := len(r.Workloads) - 1
	fmt.Fprintf(b, `<text x="40" y="%d" font-weight="600">Waits of the lighter half of the teams in the last two days of RAI's class: the worst in 20, each hour</text>`+"\n", top-5)
	const room, left, right = 230.0, 60.0, 880.0
	base := float64(top) + room + 10
	var hours [][]float64
	most := 1.0
	for _, o := range r.Outcomes[last] {
		h := hourly(o.Waits, 33*24, 35*24)
		most = max(most, slices.Max(h))
		hours = append(hours, h)
	}
	for i, h := range hours {
		var path strings.Builder
		for k, v := range h {
			fmt.Fprintf(&path, "%.1f,%.1f ", left+(right-left)*float64(k)/float64(len(h)-1), base-v/most*room)
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2.5"/>`+"\n", strings.TrimSpace(path.String()), colours[Orders()[i]])
	}
	fmt.Fprintf(b, `<text x="8" y="%.0f">%.0f s</text><text x="8" y="%.0f">0</text>`+"\n", base-room+5, most, base+4)
	fmt.Fprintf(b, `<text x="%.0f" y="%.0f">48 h before the deadline</text><text x="%.0f" y="%.0f" text-anchor="end">deadline</text>`+"\n", left, base+18, right, base+18)
}

// hourly is the 95th percentile of the waits of each hour.
func hourly(waits []Wait, from, to int) []float64 {
	buckets := make([][]float64, to-from)
	for _, w := range waits {
		if h := int(math.Floor(w.At/3600)) - from; h >= 0 && h < len(buckets) {
			buckets[h] = append(buckets[h], w.For)
		}
	}
	out := make([]float64, len(buckets))
	for i, bk := range buckets {
		if slices.Sort(bk); len(bk) > 0 {
			out[i] = bk[len(bk)*95/100]
		}
	}
	return out
}
