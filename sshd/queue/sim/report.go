package sim

import (
	"fmt"
	"io"
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

// The picture: what each user got when all always want more, and how long light users
// waited behind hogs.
const (
	width, height = 900, 580
	font          = `font-family="system-ui, sans-serif" font-size="13" fill="#333"`
)

var colours = map[string]string{"fifo": "#b0b7c3", "round-robin": "#e0a458", "raid": "#2a7f62"}

// Draw writes the picture as SVG.
func (r Report) Draw(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" %s>`+"\n", width, height, font)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	r.drawShares(&b, 56)
	r.drawNight(&b, 370)
	x := 40
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

// drawNight shows how long the light users of the deadline night waited.
func (r Report) drawNight(b *strings.Builder, top int) {
	fmt.Fprintf(b, `<text x="40" y="%d" font-weight="600">Deadline night: two hogs with 400 jobs each; how long the sixty others waited</text>`+"\n", top)
	most := 1.0
	for _, o := range r.Outcomes[1] {
		most = max(most, o.P95)
	}
	y := top + 20
	for _, o := range r.Outcomes[1] {
		fmt.Fprintf(b, `<text x="40" y="%d">%s</text>`+"\n", y+22, o.Order)
		if len(o.Waits) == 0 {
			fmt.Fprintf(b, `<text x="150" y="%d">not one of them was served in twelve hours</text>`+"\n", y+22)
		}
		for k, v := range []float64{o.P50, o.P95} {
			if len(o.Waits) > 0 {
				fmt.Fprintf(b, `<rect x="150" y="%d" width="%.1f" height="16" fill="%s"/><text x="%.1f" y="%d">%s %.0f s</text>`+"\n",
					y+k*20, v/most*560, colours[o.Order], 158+v/most*560, y+k*20+13, []string{"median", "19 of 20 within"}[k], v)
			}
		}
		y += 60
	}
}
