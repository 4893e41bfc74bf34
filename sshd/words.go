package sshd

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rai-project/raid/runner/job"
)

// This file is how things are put to people. It decides nothing.

// A grid is a table that is printed with aligned columns.
type grid struct{ rows [][]string }

func newGrid(head ...string) *grid {
	g := &grid{}
	if len(head) > 0 {
		g.rows = append(g.rows, head)
	}
	return g
}

func (g *grid) add(cells ...string) {
	for i := range cells {
		cells[i] = clean(cells[i])
	}
	g.rows = append(g.rows, cells)
}

func (g *grid) print(w io.Writer) error {
	var widths []int
	for _, r := range g.rows {
		for i, cell := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, r := range g.rows {
		var line strings.Builder
		for i, cell := range r {
			line.WriteString(cell)
			line.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// clean makes text that came from a user or a box safe for a terminal: what could
// move the cursor, set a title or hide text is shown as an escape.
func clean(s string) string {
	if !strings.ContainsFunc(s, hostile) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD"):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case hostile(r):
			q := fmt.Sprintf("%+q", r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// hostile covers control characters and the invisible ones that reorder text
// (CVE-2021-42574).
func hostile(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) }

// oneLine is the first line of a step, short enough for a terminal.
func oneLine(s string) string {
	line, rest, _ := strings.Cut(strings.TrimSpace(s), "\n")
	runes := []rune(line)
	if len(runes) > 100 {
		return clean(string(runes[:100])) + "…"
	}
	if rest != "" {
		return clean(line) + " …"
	}
	return clean(line)
}

func stateWord(j *job.Job) string {
	if j.State == job.Failed && j.Reason != job.ReasonExit {
		return fmt.Sprintf("failed (%s)", j.Reason)
	}
	if j.State == job.Failed {
		return fmt.Sprintf("failed (%d)", *j.Exit)
	}
	return string(j.State)
}

// verdict says how a job ended, in words a student understands.
func verdict(rec *job.Record) string {
	switch rec.Reason {
	case job.ReasonExit:
		if rec.State == job.Succeeded {
			return "succeeded"
		}
		return fmt.Sprintf("failed: exit status %d%s", *rec.Exit, inStep(rec))
	case job.ReasonSignal:
		return fmt.Sprintf("failed: killed by %s%s", clean(rec.Signal), inStep(rec))
	case job.ReasonTimeout:
		return "failed: it reached its time limit of " + span(rec.Spec.Limits.Time)
	case job.ReasonOOM:
		return "failed: out of memory, the limit is " + bytesWord(rec.Spec.Limits.Memory)
	case job.ReasonOutputLimit:
		return fmt.Sprintf("failed: it printed more than %d times the output limit of %s", job.OutputEnd, bytesWord(rec.Spec.Limits.Output))
	case job.ReasonDiskLimit:
		return "failed: its disk is full, the limit is " + bytesWord(rec.Spec.Limits.Disk)
	case job.ReasonKilled:
		return "failed: its box died while it ran"
	case job.ReasonCancelled:
		if rec.CancelBy != "" && rec.CancelBy != rec.User {
			return "cancelled by " + rec.CancelBy
		}
		return "cancelled"
	}
	return "failed, and it was raid's fault: " + clean(rec.Note)
}

func inStep(rec *job.Record) string {
	for _, st := range rec.Steps {
		if st.Exit != 0 {
			return fmt.Sprintf(" in step %d of %d", st.N, st.Of)
		}
	}
	return ""
}

func tenantOf(rec *job.Record) string {
	if rec.Team == "" {
		return rec.User
	}
	return rec.User + " (" + rec.Team + ")"
}

func ran(j *job.Job) string {
	switch {
	case j.StartedAt.IsZero():
		return "-"
	case j.State.Final():
		return ms(j.RunMS)
	}
	return span(time.Since(j.StartedAt.Time))
}

func ago(t time.Time) string { return span(time.Since(t)) + " ago" }

func ms(n int64) string { return span(time.Duration(n) * time.Millisecond) }

// span is a duration as people say it: two parts at most.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", max(d, 0).Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func bytesWord(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if f == float64(int64(f)) {
		return fmt.Sprintf("%d %s", int64(f), units[i])
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func join(words []string) string { return strings.Join(words, ", ") }
