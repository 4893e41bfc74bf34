package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/backup"
	"github.com/rai-project/raid/sshd/store"
)

func backupCommand() *cobra.Command {
	var path, state, to string
	cmd := &cobra.Command{
		Use:   "backup --state DIR --to DIR|FILE.tar|-",
		Short: "copy all that is kept, while raid runs",
		Long: "Writes a state folder that raid serve --state starts from, or a tar of one: the database,\n" +
			"the keys, uploads, /build archives, and the output of the jobs that have ended. raid may run.\n" +
			"On the same file system files are linked and take no room. contrib/docs/backup.md has more.",
		Example: "  raid backup --state /var/lib/raid --to /backup/raid-$(date +%F)\n" +
			"  raid backup --state /var/lib/raid --to - | ssh elsewhere 'cat >raid.tar'",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readConfig(path)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("state") {
				c.State = state
			}
			ctx, signals := onSignals(cmd.Context())
			defer signals.stop()
			return takeBackup(ctx, c, to)
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "raid.toml")
	cmd.Flags().StringVar(&state, "state", "/var/lib/raid", "the state folder")
	cmd.Flags().StringVar(&to, "to", "", "a new folder, a new file that ends in .tar, or - for a tar on stdout")
	cmd.MarkFlagRequired("to")
	return cmd
}

func takeBackup(ctx context.Context, c config, to string) (err error) {
	dir, err := absolute(c.State)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "host_key")); err != nil {
		return cli.Hintf(fmt.Errorf("%s is no state folder of raid: %w", dir, err), "say which with --state or --config")
	}
	if to == "-" && term.IsTerminal(int(os.Stdout.Fd())) {
		return errors.New("stdout is a terminal: a tar goes into a pipe or a file")
	}
	if err := c.reveal(dir); err != nil {
		return err
	}
	b := backup.Config{Dir: dir, Tables: sshd.Tables(), To: to, Stdout: os.Stdout}
	if c.Queue.Store != "sqlite" {
		db, err := store.OpenRedis(ctx, store.RedisOptions{URL: c.Queue.Store})
		if err != nil {
			return err
		}
		defer db.Close()
		b.Store = db
	}
	p := newProgress()
	b.Told = func(r backup.Report) { p.say("%d files, %d MiB", r.Files, r.Bytes>>20) }
	r, err := backup.Take(ctx, b)
	p.end()
	if err != nil {
		return err
	}
	said := fmt.Sprintf("raid: the backup has %d files with %d MiB, %d of them links, and the output of %s", r.Files, r.Bytes>>20, r.Linked, counted(r.Jobs, "ended job"))
	if r.Gone > 0 {
		said += fmt.Sprintf("; %s removed meanwhile", counted(r.Gone, "file"))
	}
	fmt.Fprintln(os.Stderr, said)
	return nil
}

func migrateCommand() *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use:   "migrate --from STORE --to STORE",
		Short: "move the queue to Redis, or back",
		Long: "Copies all people, keys, jobs and history from one store to another, an empty one, and compares.\n" +
			"A store is sqlite:DIR, with the state folder, or a URL as [queue] store has it. No raid may use\n" +
			"either. Files stay where they are; the source is not changed. Then set [queue] store.",
		Example: "  raid migrate --from sqlite:/var/lib/raid --to redis://127.0.0.1:6379/0",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, signals := onSignals(cmd.Context())
			defer signals.stop()
			return migrate(ctx, cmd.OutOrStdout(), from, to)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "what to copy")
	cmd.Flags().StringVar(&to, "to", "", "where to")
	cmd.MarkFlagRequired("from")
	cmd.MarkFlagRequired("to")
	return cmd
}

func migrate(ctx context.Context, w io.Writer, from, to string) error {
	source, err := openUnused(ctx, from, false)
	if err != nil {
		return fmt.Errorf("--from: %w", err)
	}
	defer source.Close()
	target, err := openUnused(ctx, to, true)
	if err != nil {
		return fmt.Errorf("--to: %w", err)
	}
	defer target.Close()
	if err := backup.Whole(ctx, source); err != nil {
		return fmt.Errorf("--from: %w", err)
	}
	p := newProgress()
	counts, err := backup.Copy(ctx, source, target, sshd.Tables(), func(rows int) { p.say("%d rows", rows) })
	p.end()
	if errors.Is(err, backup.ErrNotEmpty) {
		return cli.Hintf(fmt.Errorf("--to: %w", err), "choose an empty one: another folder, or move its raid.db away; or add name=NAME to the URL")
	}
	if terr := tabulate(w, counts); terr != nil || err != nil {
		return errors.Join(err, terr)
	}
	fmt.Fprintln(os.Stderr, "raid: both have the same; now set [queue] store, and keep the old one until you have seen it work")
	return target.Close()
}

// tabulate prints how many rows of each table there are.
func tabulate(w io.Writer, counts []backup.Count) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "table\tfrom\tto\t")
	for _, c := range counts {
		fmt.Fprintf(t, "%s\t%d\t%d\t\n", c.Table, c.From, c.To)
	}
	return t.Flush()
}

// openUnused opens a store that no raid uses, and keeps others from using it. One that is
// to be made may be missing.
func openUnused(ctx context.Context, name string, make bool) (store.Store, error) {
	if dir, ok := strings.CutPrefix(name, "sqlite:"); ok {
		return openFolder(ctx, dir, make)
	}
	if !store.IsRedisURL(name) {
		said, _, _ := strings.Cut(name, ":") // behind it may be a password
		return nil, fmt.Errorf("%q is no store: it is sqlite:DIR, or a URL of Redis as redis://127.0.0.1:6379/0", said)
	}
	db, err := store.OpenRedis(ctx, store.RedisOptions{URL: name, Logf: func(format string, args ...any) { fmt.Fprintf(os.Stderr, "raid: "+format+"\n", args...) }})
	if err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, 2*store.LeaseTTL)
	defer cancel()
	lease, err := db.Campaign(short, store.Member{ID: rand.Text(), Addr: "raid migrate"})
	if err != nil {
		if other, oerr := db.Leader(ctx); oerr == nil {
			err = cli.Hintf(fmt.Errorf("it is in use, by %s: %w", other.Addr, store.ErrLocked), "stop that first")
		}
		return nil, errors.Join(err, db.Close())
	}
	s := &leased{db, lease}
	if make {
		if err := db.Claim(ctx, lease); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

func openFolder(ctx context.Context, dir string, make bool) (store.Store, error) {
	if _, err := os.Stat(filepath.Join(dir, "raid.db")); err != nil && !make {
		return nil, err
	}
	if make {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	st, err := store.OpenSQLite(ctx, dir, nil, jobsView)
	return st, inUse(err, dir)
}

// A leased is a store in Redis that this process leads.
type leased struct {
	*store.Redis
	lease *store.Lease
}

// Close gives the lease up first.
func (l *leased) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), store.LeaseTTL)
	defer cancel()
	l.lease.Resign(ctx) // or it runs out
	return l.Redis.Close()
}

// A progress is a line that changes, if somebody sees it.
type progress struct {
	seen bool
	last time.Time
	said bool
}

func newProgress() *progress { return &progress{seen: term.IsTerminal(int(os.Stderr.Fd()))} }

func (p *progress) say(format string, args ...any) {
	if !p.seen || time.Since(p.last) < 100*time.Millisecond {
		return
	}
	p.last, p.said = time.Now(), true
	fmt.Fprintf(os.Stderr, "\r\033[Kraid: "+format+" …", args...)
}

// end removes the line.
func (p *progress) end() {
	if p.said {
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
}
