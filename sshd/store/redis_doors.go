package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// DoorTTL is how long a door is known that is not heard of any more. Whoever is one calls
// PutDoor every third of it.
const DoorTTL = 30 * time.Second

// PutDoor tells the deployment of a door for another DoorTTL. fingerprint is that of m.Key
// (SHA256:…).
func (r *Redis) PutDoor(ctx context.Context, fingerprint string, m Member) error {
	text, err := json.Marshal(m)
	if err == nil {
		err = r.both(ctx, func(p redis.Pipeliner) {
			p.Set(ctx, r.space.door(fingerprint), text, DoorTTL)
			p.SAdd(ctx, r.space.doors(), fingerprint)
		})
	}
	if err != nil {
		return fmt.Errorf("put door: %w", err)
	}
	return nil
}

// both runs commands together.
func (r *Redis) both(ctx context.Context, fill func(redis.Pipeliner)) error {
	if err := r.usable(ctx); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	p := r.client.TxPipeline()
	fill(p)
	if _, err := p.Exec(short); err != nil {
		return r.failed(ctx, err)
	}
	return nil
}

// Door returns the door with a fingerprint, or ErrNoMember.
func (r *Redis) Door(ctx context.Context, fingerprint string) (m Member, err error) {
	text, err := r.get(ctx, func(ctx context.Context) ([]byte, error) { return r.client.Get(ctx, r.space.door(fingerprint)).Bytes() })
	if errors.Is(err, redis.Nil) {
		err = ErrNoMember
	}
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err != nil {
		return m, fmt.Errorf("door %s: %w", fingerprint, err)
	}
	return m, nil
}

// Doors returns all doors by fingerprint.
func (r *Redis) Doors(ctx context.Context) (map[string]Member, error) {
	out, err := r.read(ctx, doorsScript, []string{r.space.doors()}, r.space.door(""))
	if err != nil {
		return nil, fmt.Errorf("doors: %w", err)
	}
	all := map[string]Member{}
	for i := 0; i+1 < len(out); i += 2 {
		var m Member
		if err := json.Unmarshal([]byte(text(out[i+1])), &m); err != nil {
			return nil, fmt.Errorf("door %s: %w", text(out[i]), err)
		}
		all[text(out[i])] = m
	}
	return all, nil
}

// DropDoor forgets a door at once.
func (r *Redis) DropDoor(ctx context.Context, fingerprint string) error {
	err := r.both(ctx, func(p redis.Pipeliner) {
		p.Del(ctx, r.space.door(fingerprint))
		p.SRem(ctx, r.space.doors(), fingerprint)
	})
	if err != nil {
		return fmt.Errorf("drop door: %w", err)
	}
	return nil
}
