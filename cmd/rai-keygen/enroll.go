package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/keys/profile"
)

// A ticket is one enrolment on its way.
type ticket struct {
	keys.Enrollment
	where   string // "class.csv:3: ", or ""
	keyFile string // absolute; "" if we do not have the private key
	made    bool   // we made keyFile just now
}

// An answer is raid's line about one ticket.
type answer struct {
	User        string `json:"user"`
	Fingerprint string `json:"fingerprint"`
	New         bool   `json:"new"`
	Error       string `json:"error"`
	Hint        string `json:"hint"`
}

// enroll is the root command: one person, or a class.
func (o *options) enroll(ctx context.Context) error {
	if o.list != "" {
		if o.person.User != "" || o.pub != "" {
			return cli.Usagef("", "--list stands alone: its rows name the users")
		}
		return o.enrollClass(ctx)
	}
	for _, f := range []struct{ name, value string }{{"username", o.person.User}, {"email", o.person.Email}, {"role", o.role}} {
		if strings.TrimSpace(f.value) == "" {
			return cli.Usagef("rai-keygen --help shows an example", "empty %s", f.name)
		}
	}
	o.person.Role = keys.Role(o.role)
	t, err := o.ticket(o.person, o.pub)
	if err != nil {
		return err
	}
	p, failed, err := o.submit(ctx, []*ticket{t}, true)
	if err != nil {
		return err
	}
	if failed > 0 {
		return errSaid(failed)
	}
	text, err := p.Marshal()
	if err != nil {
		return err
	}
	_, err = o.stdout.Write(text)
	return err
}

// enrollClass enrols the rows of a class list over one session. Bad rows are said and
// left out.
func (o *options) enrollClass(ctx context.Context) error {
	f, err := os.Open(o.list)
	if err != nil {
		return fmt.Errorf("class list: %w", err)
	}
	defer f.Close()
	rows, bad := readClass(f)
	for _, err := range bad {
		fmt.Fprintf(o.stderr, "rai-keygen: %s:%v\n", o.list, err)
	}
	failed := 0
	for _, err := range bad {
		if !errors.Is(err, errHeader) {
			failed++
		}
	}
	var tickets []*ticket
	for _, r := range rows {
		fmt.Fprintf(o.stderr, "Processing: %s, %s\n", keys.Clean(r.Last), keys.Clean(r.First))
		where := fmt.Sprintf("%s:%d: ", o.list, r.line)
		t, err := o.ticket(r.Enrollment, "")
		if err != nil {
			fmt.Fprintf(o.stderr, "rai-keygen: %s%v\n", where, err)
			failed++
			continue
		}
		t.where = where
		tickets = append(tickets, t)
	}
	refused := 0
	if len(tickets) > 0 {
		if _, refused, err = o.submit(ctx, tickets, true); err != nil {
			return err
		}
	}
	fmt.Fprintf(o.stderr, "rai-keygen: %d enrolled, %d failed; keys and profiles are in %s\n", len(tickets)-refused, failed+refused, o.out)
	if failed += refused; failed > 0 {
		return errSaid(failed)
	}
	return nil
}

// enrollRunner enrols a machine and prints how to start it.
func (o *options) enrollRunner(ctx context.Context, name string) error {
	t, err := o.ticket(keys.Enrollment{User: "runner-" + name, Role: keys.Runner}, "")
	if err != nil {
		return err
	}
	_, failed, err := o.submit(ctx, []*ticket{t}, false)
	if err != nil {
		return err
	}
	if failed > 0 {
		return errSaid(failed)
	}
	_, err = fmt.Fprintln(o.stdout, t.keyFile)
	return err
}

// errSaid ends the program after each failure was said on a line of its own.
func errSaid(n int) error {
	return cli.Fail(cli.Input, fmt.Errorf("%d could not be enrolled", n), "")
}

// ticket finds or makes the key for e. With pub, the key is that file's.
func (o *options) ticket(e keys.Enrollment, pub string) (*ticket, error) {
	e.User = strings.ToLower(strings.TrimSpace(e.User))
	// The names of a key's neighbours would mix up two people's files.
	if !keys.ValidName(e.User) || strings.HasSuffix(e.User, ".pub") || strings.HasSuffix(e.User, ".rai_profile") {
		return nil, &keys.RefusedError{Why: fmt.Sprintf("bad user name %q", e.User), Hint: "use 1 to 32 of a-z 0-9 . _ -"}
	}
	t := &ticket{Enrollment: e}
	if err := os.MkdirAll(o.out, 0o700); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	if pub != "" {
		return t, t.usePub(pub)
	}
	path, err := filepath.Abs(filepath.Join(o.out, e.User))
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	t.keyFile = path
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Key, err = publicOf(path)
		return t, err
	}
	private, public, err := keys.NewKey(comment(e))
	if err != nil {
		return nil, err
	}
	t.Key, t.made = public, true
	return t, keys.WriteKey(path, private, public)
}

// comment is what a new key is called: the address if there is one.
func comment(e keys.Enrollment) string {
	if e.Email != "" {
		return e.Email
	}
	return e.User
}

// usePub enrols a public key that exists.
func (t *ticket) usePub(pub string) error {
	b, err := os.ReadFile(pub)
	if err != nil {
		return fmt.Errorf("public key: %w", err)
	}
	if _, err := keys.ParseKey(string(b)); err != nil {
		return err
	}
	t.Key = strings.TrimSpace(string(b))
	if private, ok := strings.CutSuffix(pub, ".pub"); ok {
		if abs, err := filepath.Abs(private); err == nil {
			t.keyFile = abs // where its owner has it, if this is their machine
		}
	}
	return nil
}

// publicOf returns the public key of a key file that exists. One with a passphrase
// cannot be opened here, but its .pub can.
func publicOf(path string) (string, error) {
	s, err := keys.LoadSigner(path, nil)
	if err == nil {
		line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
		if b, e := os.ReadFile(path + ".pub"); e == nil && strings.HasPrefix(string(b), line) {
			line = strings.TrimSpace(string(b)) // with its comment
		}
		return line, nil
	}
	if b, e := os.ReadFile(path + ".pub"); e == nil {
		if _, e := keys.ParseKey(string(b)); e == nil {
			return strings.TrimSpace(string(b)), nil
		}
	}
	return "", err
}

// submit sends the tickets over one session and, with profiles, writes one for each
// that was taken. It returns the last profile and how many were refused, each of which
// it has said. Keys that we made for people who were refused are removed again.
func (o *options) submit(ctx context.Context, tickets []*ticket, profiles bool) (last *profile.Profile, refused int, err error) {
	open := tickets // those without an answer
	c, target, err := o.connect(ctx)
	if err != nil {
		discard(open)
		return nil, 0, err
	}
	defer c.Close()
	s, err := c.Start(ctx, "admin enroll", o.stderr)
	if err != nil {
		return nil, 0, fmt.Errorf("enrol: %w", err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		send(s.Stdin, tickets)
	}()
	in := bufio.NewReader(io.LimitReader(s.Stdout, 64<<20))
	for len(open) > 0 {
		a, err := readAnswer(in, open[0].User)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.Close()
			s.Wait()
			<-sent
			return nil, 0, err
		}
		t := open[0]
		open = open[1:]
		if a.Error != "" {
			refused++
			discard([]*ticket{t})
			o.sayRefused(t, a)
			continue
		}
		if last, err = o.taken(t, a, c, target, profiles); err != nil {
			fmt.Fprintf(o.stderr, "rai-keygen: %s%v\n", t.where, err)
			refused++
		}
	}
	io.Copy(io.Discard, in)
	status, err := s.Wait()
	<-sent
	if err == nil && len(open) > 0 {
		discard(open)
		err = notAnswered(status, len(open))
	}
	// After a cut or a Ctrl-C raid may have taken more than it said: those keys stay,
	// and the same line again enrols the same keys.
	return last, refused, err
}

// send writes the tickets as lines. If raid stops reading, its answers say why.
func send(w io.WriteCloser, tickets []*ticket) {
	defer w.Close()
	enc := json.NewEncoder(w)
	for _, t := range tickets {
		if enc.Encode(t.Enrollment) != nil {
			return
		}
	}
}

func readAnswer(in *bufio.Reader, user string) (answer, error) {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return answer{}, io.EOF
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("raid answered %.80q: %w", line, err)
	}
	if a.User != user {
		return a, fmt.Errorf("raid answered about %q, not about %s", a.User, user)
	}
	return a, nil
}

func notAnswered(status, n int) error {
	if status == 0 {
		status = cli.Input
	}
	hint := ""
	if status == cli.Refused {
		hint = "log in with the key of an admin: -i DIR/admin"
	}
	return cli.Fail(status, fmt.Errorf("raid did not take %d of them (status %d)", n, status), hint)
}

func (o *options) sayRefused(t *ticket, a answer) {
	fmt.Fprintf(o.stderr, "rai-keygen: %s%s: %s\n", t.where, t.User, printable(a.Error))
	if a.Hint != "" {
		fmt.Fprintf(o.stderr, "rai-keygen: %s\n", printable(a.Hint))
	}
}

// printable keeps what a server says from driving the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '_'
		}
		return r
	}, s)
}

// taken writes down what raid accepted.
func (o *options) taken(t *ticket, a answer, c *dial.Client, target dial.Target, write bool) (*profile.Profile, error) {
	if o.verbose || o.debug {
		fmt.Fprintf(o.stderr, "rai-keygen: enrolled %s with %s\n", t.User, printable(a.Fingerprint))
	}
	team := t.Team
	if team == "-" {
		team = ""
	}
	server := o.public
	if server == "" {
		server = target.User + "@" + target.Addr
	}
	p := &profile.Profile{
		FirstName: t.First, LastName: t.Last, Username: t.User, Email: t.Email, Affiliation: t.Affiliation,
		Role: strings.ToLower(string(t.Role)), Team: profile.Team{Name: team},
		Server: server, Key: t.keyFile,
		HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(c.HostKey()))),
	}
	if !write {
		return p, nil
	}
	return p, p.Write(filepath.Join(o.out, t.User+".rai_profile"))
}

// discard removes the keys that we made for nothing.
func discard(tickets []*ticket) {
	for _, t := range tickets {
		if t.made {
			os.Remove(t.keyFile)
			os.Remove(t.keyFile + ".pub")
		}
	}
}
